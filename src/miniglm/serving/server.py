"""One server: the page at /, the API under /v1, /healthz, /metrics and /report; how it starts and how it ends.

Heavy imports (gradio above all) are inside the functions: the command line looks here before it knows what is wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from miniglm.errors import MiniGLMError
from miniglm.serving.settings import Limits

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from miniglm.serving.book import BookService
    from miniglm.serving.guards import State
    from miniglm.serving.service import Service

PORT = 7860
_NEEDED = ("fastapi", "uvicorn", "httptools", "gradio", "httpx", "prometheus_client")
_LAST_BYTES_SECONDS = 0.5
"""For what was generated to reach its readers, at the end."""


def missing() -> list[str]:
    """The packages of the extra `serve` that are not installed."""
    return [name for name in _NEEDED if find_spec(name) is None]


def port_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    try:
        bind(host, port).close()
    except MiniGLMError:
        return False
    return True


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, not yet listening. Port 0 takes a free one.

    Raises:
        MiniGLMError: the port is taken or reserved, or there is no such address here.
    """
    if not 0 <= port < 65536:
        raise MiniGLMError(f"--port 是 {port}，应为 0 到 65535", fix="例如 --port 7860；0 是随便一个空着的")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise MiniGLMError(
            f"--host 是 {host!r}，找不到这个地址", fix="只在本机用写 127.0.0.1，对外写 0.0.0.0"
        ) from None
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    sock = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # on Windows this would let two servers share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()  # a second server could bind the same port until one listens
    except OSError as error:
        sock.close()
        fix = "换一个，例如 --port 0 取一个空着的"
        if isinstance(error, PermissionError):
            raise MiniGLMError(f"没有权限用端口 {port}", fix=fix) from None
        raise MiniGLMError(f"不能在 {host} 的端口 {port} 上提供服务（{error.strerror}）", fix=fix) from None
    return sock


def model_name(run: Path) -> str:
    """The model's name in the API: the run folder's."""
    path = run.resolve()
    return (path.parent.name if path.name == "model" else path.name) or "miniglm"


def run(
    folder: Path | None,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    api_key: str | None = None,
    backend: str | None = None,
    backend_key: str | None = None,
    limits: Limits | None = None,
    open_browser: bool = False,
    log_prompts: bool = False,
    device: str | None = None,
    cors: Sequence[str] = (),
) -> None:
    """Serves until it is told to end (Ctrl-C, SIGTERM).

    Args:
        folder: a run or model folder; None with `backend`.
        backend: the address of an OpenAI-compatible server, `http://host:8000/v1`, that has the model instead.

    Raises:
        MiniGLMError: no model, a taken port, or packages that are not installed.
    """
    if absent := missing():
        raise MiniGLMError(
            f"没有安装 {'、'.join(absent)}", fix='服务要装扩展 serve：pip install -e ".[serve]"，或 make install'
        )
    # Nothing else fits into a request's header. The key itself is not in the message: it may end up in a log.
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        raise MiniGLMError("--api-key 是空的，或有英文字母、数字和符号以外的字", fix="给一个长的随机字符串")
    limits = limits or Limits()
    sock = bind(host, port)
    with contextlib.closing(sock):
        book = _open_book(folder)
        service = _open_service(folder, backend, backend_key, limits, device)
        try:
            _serve(service, book, sock, folder, limits, api_key, open_browser, log_prompts, cors)
        finally:
            _end(service, 0.0)


def _open_service(
    folder: Path | None, backend: str | None, backend_key: str | None, limits: Limits, device: str | None
) -> Service:
    if backend is not None:
        from miniglm.serving.backend import RemoteService
        from miniglm.serving.service import ServiceError

        if not re.match(r"https?://[^/\s]+", backend):
            raise MiniGLMError(f"--backend 是 {backend!r}，应为网址", fix="例如 --backend http://127.0.0.1:8000/v1")
        remote = RemoteService(backend, backend_key)
        try:
            asyncio.run(remote.find_model())
        except ServiceError as error:
            raise MiniGLMError(f"--backend {backend}：{error.message}", fix="先开好那个服务；网址要写到 /v1") from None
        return remote
    if folder is None:
        raise MiniGLMError("没有给出模型", fix="给出运行目录，例如 miniglm serve runs/demo，或者 --backend 网址")
    from miniglm.locate import find_model
    from miniglm.serving.engine import load_served
    from miniglm.serving.service import LocalService
    from miniglm.serving.worker import Worker
    from miniglm.tokenizer import Tokenizer

    model = find_model(folder)
    worker = Worker(partial(load_served, model, device), limits)
    try:
        import miniglm.serving.page  # noqa: F401  # takes as long as the model in the other process

        return LocalService(model_name(folder), Tokenizer.load(model), worker)
    except BaseException:
        worker.close(0.0)
        raise


def _end(service: Service, seconds: float) -> None:
    """Ends the engine."""
    from miniglm.serving.service import LocalService

    if isinstance(service, LocalService):
        service.close(seconds)


def _open_book(folder: Path | None) -> BookService | None:
    """What answers from the book, where the run has an index."""
    from miniglm.lookup import answerer_of
    from miniglm.serving.book import BookService

    answerer = None if folder is None else answerer_of(folder)
    return None if answerer is None else BookService(answerer)


def _serve(
    service: Service,
    book: BookService | None,
    sock: socket.socket,
    folder: Path | None,
    limits: Limits,
    api_key: str | None,
    open_browser: bool,
    log_prompts: bool,
    cors: Sequence[str],
) -> None:
    from miniglm.serving.app import create_app
    from miniglm.serving.guards import State
    from miniglm.serving.service import LocalService
    from miniglm.ui import say

    address, port = sock.getsockname()[:2]
    loopback = ipaddress.ip_address(address).is_loopback
    state = State()
    app = create_app(
        service,
        limits,
        state,
        run=folder,
        api_key=api_key,
        loopback=loopback,
        cors=cors,
        log_prompts=log_prompts,
        book=book,
    )
    _log_to_stderr()
    _allow_files(limits.connections + 256)
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"

    def ready() -> None:
        if not loopback and api_key is None:
            say(
                f"注意：{host_text(address)} 对外开放，又没有 API key：能连到这台机器的人都能用。加 --api-key 可以设一个"
            )
        what = (
            f"页面 {url}，API {url}/v1（模型名 {service.model_id}）"
            if isinstance(service, LocalService)
            else f"页面 {url}"
        )
        say(f"{what}，Ctrl-C 结束")
        if open_browser and _has_display():
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    async def drain() -> None:
        await asyncio.to_thread(_end, service, limits.shutdown_seconds)

    server = uvicorn_server(app, limits, state, ready, drain)
    # The packages' hundreds of thousands of objects stay to the end: looking through them for garbage, while answers
    # wait and once more at the exit, takes seconds in all.
    gc.freeze()
    try:
        asyncio.run(server.serve(sockets=[sock]))
    finally:
        gc.freeze()


def host_text(address: str) -> str:
    """An address a server listens on, as a reader knows it."""
    return "所有网络地址" if address in ("0.0.0.0", "::") else address


def uvicorn_server(
    app: FastAPI, limits: Limits, state: State, ready: Callable[[], None], drain: Callable[[], Awaitable[None]]
) -> uvicorn.Server:
    """The server of `app`; `serve(sockets=[…])` runs it.

    Args:
        ready: called when requests are answered.
        drain: returns when what runs has finished, after a signal to end.
    """
    import uvicorn

    from miniglm.serving.guards import protocol_class

    config = uvicorn.Config(
        app,
        http=protocol_class(limits),
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(limits.header_seconds),
        timeout_graceful_shutdown=1,
    )

    class Server(uvicorn.Server):
        """uvicorn's server with another end: it goes on listening while it finishes what runs, so that who comes
        meanwhile hears why not, and it exits with 0, not by the signal."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            loop = asyncio.get_running_loop()

            def end(number: int, frame: FrameType | None) -> None:
                if state.draining:  # the second time: at once
                    os._exit(128 + number)
                state.draining = True
                loop.call_soon_threadsafe(start_draining)

            def start_draining() -> None:
                self._draining = loop.create_task(self._drain())  # a task that nothing holds may be collected

            known = (signal.SIGINT, signal.SIGTERM)
            before = {number: signal.signal(number, end) for number in known}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def _drain(self) -> None:
            try:
                await drain()
                last = asyncio.get_running_loop().time() + _LAST_BYTES_SECONDS
                while state.open and asyncio.get_running_loop().time() < last:
                    await asyncio.sleep(0.02)
            finally:
                self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # What is open still is pages that listen for news, and those who do not read.
            for connection in list(self.server_state.connections):
                connection.shutdown()
            await asyncio.sleep(0.1)
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            await super().shutdown(sockets)

    return Server(config)


def _log_to_stderr() -> None:
    """Our own log and uvicorn's errors, and nothing else of theirs."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("miniglm.serving", logging.INFO), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


def _allow_files(number: int) -> None:
    """Lets the process open so many files, connections among them, as far as the system permits."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _has_display() -> bool:
    """Whether there is a screen that a browser could open on, and someone at it."""
    if not sys.stderr.isatty():
        return False
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
