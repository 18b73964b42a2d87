"""The server as a whole: who gets in, connections that send or read nothing, how it starts and how it ends."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import fails
from served import MODEL, Running, Start, until

from miniglm.errors import MiniGLMError
from miniglm.serving.server import model_name, run
from miniglm.serving.settings import Limits

ASKED = [{"role": "user", "content": "长江在哪"}]
KEY = "a-key-that-nobody-guesses"


def ask(url: str, **headers: str) -> httpx.Response:
    body = {"model": MODEL, "messages": ASKED, "max_tokens": 2}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120)


def raw(running: Running, data: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", running.port), timeout=120)
    made.sendall(data)
    return made


def read_all(connection: socket.socket) -> bytes:
    """Until the server ends the connection; however it does."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            data += part
    return data


# ---- who gets in ----------------------------------------------------------------------------------------------------


def test_only_loopback_names_and_own_pages(server: Running) -> None:
    for host in (f"localhost:{server.port}", "127.0.0.1", "[::1]:80"):
        assert httpx.get(server.url + "/healthz", headers={"Host": host}).json() == {"status": "ok"}
    for host in ("evil.example", "127.0.0.1.evil.example", "[", ""):
        answer = httpx.get(server.url + "/healthz", headers={"Host": host})
        assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"
    assert ask(server.url, Origin=server.url).status_code == 200
    for origin in ("https://evil.example", "null", "http://[", f"http://127.0.0.1:{server.port + 1}"):
        answer = ask(server.url, Origin=origin)
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_another_site_may_be_allowed(start: Start) -> None:
    site = "https://my.site"
    with start(cors=(site,), api_key=KEY) as running:
        preflight = httpx.options(
            running.url + "/v1/chat/completions",
            headers={
                "Origin": site,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            },
        )
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == site
        answer = ask(running.url, Origin=site, Authorization=f"Bearer {KEY}")
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == site
        assert ask(running.url, Origin="https://evil.example", Authorization=f"Bearer {KEY}").status_code == 403


def test_the_key(start: Start) -> None:
    with start(api_key=KEY) as running:
        assert ask(running.url, Authorization=f"Bearer {KEY}").status_code == 200
        for given in (
            {},
            {"Authorization": KEY},
            {"Authorization": f"Bearer {KEY}x"},
            {"Authorization": "Bearer \xff"},
        ):
            headers = {name.encode(): value.encode("latin-1") for name, value in given.items()}
            answer = httpx.get(running.url + "/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key" and KEY not in answer.text
        assert httpx.get(running.url + "/metrics").status_code == 401
        assert httpx.get(running.url + "/openapi.json").status_code == 401
        assert httpx.get(running.url + "/healthz").status_code == 200


def test_a_browser_logs_in_once(start: Start) -> None:
    with start(api_key=KEY) as running, httpx.Client(base_url=running.url, headers={"Accept": "text/html"}) as browser:
        sent = browser.get("/report")
        assert sent.status_code == 303 and sent.headers["location"] == "/login"
        form = browser.get("/login")
        assert form.status_code == 200 and 'type="password"' in form.text and "://" not in form.text
        wrong = browser.post("/login", data={"key": "<script>"})
        assert wrong.status_code == 401 and "set-cookie" not in wrong.headers and "<script>" not in wrong.text
        assert browser.post("/login", content=b"key=" + b"x" * 100_000).status_code == 401
        right = browser.post("/login", data={"key": KEY})
        assert right.status_code == 303 and right.headers["location"] == "/"
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and KEY not in cookie
        assert browser.get("/v1/models").status_code == 200
        assert browser.get("/report").status_code == 404  # let in; there is none
        browser.cookies.clear()
        for forged in ("miniglm=", "miniglm=0", 'miniglm="', f"miniglm={KEY}", "\xff"):
            answer = browser.get("/v1/models", headers={b"Cookie": forged.encode("latin-1"), b"Accept": b"*/*"})
            assert answer.status_code == 401


def test_one_client_gets_only_so_much(start: Start) -> None:
    with start(Limits(per_client=2, max_tokens=10**6)) as running:
        body = {"model": MODEL, "messages": ASKED, "max_tokens": 10**6, "stream": True}
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(httpx.Client(base_url=running.url, timeout=120))
            for _ in range(2):
                stack.enter_context(client.stream("POST", "/v1/chat/completions", json=body))
            busy = ask(running.url)
            assert busy.status_code == 429 and int(busy.headers["retry-after"]) >= 1
            assert "per_client" in busy.json()["error"]["message"]
        until(lambda: ask(running.url).status_code == 200, "a client that closed its requests may ask again")


# ---- bodies and connections ------------------------------------------------------------------------------------------


def test_a_body_may_be_so_large(start: Start) -> None:
    with start(Limits(max_body=2000)) as running:
        large = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "a" * 3000}]}).encode()

        def pieces() -> Iterator[bytes]:  # without a Content-Length
            for begin in range(0, len(large), 100):
                yield large[begin : begin + 100]

        for content in (large, pieces()):
            answer = httpx.post(
                running.url + "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
            )
            assert answer.status_code == 413 and "max_body" in answer.json()["error"]["message"]
        assert ask(running.url).status_code == 200


def test_connections_that_send_nothing_are_ended_and_others_served(start: Start) -> None:
    with start(Limits(header_seconds=1.0)) as running:
        beginnings = (
            b"",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow:",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{",
        )
        connections = [raw(running, beginnings[number % 3]) for number in range(300)]
        assert ask(running.url).status_code == 200
        endings = [read_all(connection) for connection in connections]
        for connection in connections:
            connection.close()
        for number, ending in enumerate(endings):
            if number % 3 == 2:
                assert ending.startswith(b"HTTP/1.1 408 ") and b"header_seconds" in ending
            else:
                assert ending == b""
        assert ask(running.url).status_code == 200


def test_what_is_no_http_is_refused(server: Running) -> None:
    for data in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 50_000, b"A" * 200_000):
        with contextlib.suppress(ConnectionError), raw(server, data) as connection:
            with contextlib.suppress(OSError):  # it may be refused and ended already
                connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 40")
    assert ask(server.url).status_code == 200


def test_a_head_without_end_is_refused_before_its_time_is_up(start: Start) -> None:
    """The parser keeps it until it is whole."""
    with start(Limits(header_seconds=1000.0)) as running:
        for beginning in (b"GET /", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: "):
            with raw(running, beginning) as connection, contextlib.suppress(ConnectionError):
                for _ in range(100):
                    connection.sendall(b"a" * 10_000)
                read_all(connection)
        assert ask(running.url, **{"X-Long": "a" * 20_000}).status_code == 200


def test_a_client_that_does_not_read_is_cut_off(start: Start) -> None:
    with start(Limits(max_tokens=10**6, write_seconds=0.5)) as running:
        body = {"model": MODEL, "messages": ASKED, "max_tokens": 10**6, "stream": True, "n": 8}
        content = json.dumps(body | {"logprobs": True, "top_logprobs": 20}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", running.port))
            deaf.sendall(head.encode() + content)
            worker = running.service.worker
            until(lambda: worker.running == 8, "it is served at first")
            assert ask(running.url).status_code == 200
            until(lambda: worker.running == 0, "then it is dropped")
        until(lambda: running.state.open == 0, "its request ends")
        assert ask(running.url).status_code == 200


# ---- beginning and end ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def miniglm_serve(*arguments: str | Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """`miniglm serve` in a process of its own, at a free port: the process, its address, what it has said so far."""
    process = subprocess.Popen(
        [sys.executable, "-m", "miniglm", "serve", *map(str, arguments), "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1", "COLUMNS": "200"} | environment,
    )
    said: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()))
    reader.start()

    def address() -> str | None:
        found = (
            re.search(r"http://\S+?:\d+(?=[，/])", "".join(said).split("页面", 1)[-1])
            if "页面" in "".join(said)
            else None
        )
        return found[0] if found else None

    try:
        until(lambda: address() is not None or process.poll() is not None, "it starts")
        assert address() is not None, "".join(said)
        yield process, str(address()), said
    finally:
        process.kill()
        process.wait()
        reader.join()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
def test_told_to_end_it_finishes_what_runs_and_refuses_what_is_new(model_folder: Path, tmp_path: Path) -> None:
    with miniglm_serve(model_folder, MINIGLM_API_KEY=KEY) as (process, url, said):
        headers = {"Authorization": f"Bearer {KEY}"}
        assert "text/html" in httpx.get(url, headers={"Accept": "text/html"} | headers).headers["content-type"]
        # Long enough to be at work when the next request comes, and short enough for a slow machine to finish.
        body = {"model": MODEL, "messages": ASKED, "max_tokens": 512, "n": 4, "stream": True}
        with httpx.Client(base_url=url, headers=headers, timeout=120) as client:
            assert client.get("/healthz").json() == {"status": "ok"}
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                until(lambda: client.get("/healthz").json() == {"status": "draining"}, "it is told to end")
                refused = client.get("/v1/models")
                rest = "\n".join(lines)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "service_unavailable"
        assert rest.rstrip().endswith("data: [DONE]") and rest.count('"finish_reason":"length"') == 4
        assert process.wait() == 0
    assert KEY not in "".join(said) and "长江" not in "".join(said) and "Traceback" not in "".join(said)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_a_second_signal_ends_it_at_once_and_prompts_are_shown_when_asked(model_folder: Path) -> None:
    with miniglm_serve(model_folder, "--log-prompts") as (process, url, said):
        body = {"model": MODEL, "messages": ASKED, "max_tokens": 1024, "n": 8, "stream": True}
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=120) as answer:
            next(answer.iter_lines())
            process.send_signal(signal.SIGINT)
            until(lambda: httpx.get(url + "/healthz").status_code == 503, "it is told once")
            process.send_signal(signal.SIGINT)
            assert process.wait() == 130
    assert "长江在哪" in "".join(said)


def test_a_page_without_a_model_of_its_own(model_folder: Path, server: Running) -> None:
    with miniglm_serve("--backend", f"{server.url}/v1") as (_, url, said):
        page = httpx.get(url)
        assert page.status_code == 200 and MODEL in page.text
        answer = httpx.get(url + "/v1/models")
        assert answer.status_code == 404 and "--backend" in answer.json()["error"]["message"]
        assert "miniglm_http_requests_total" in httpx.get(url + "/metrics").text
        assert "/v1" not in "".join(said)


def test_what_cannot_be_served_is_said_in_one_line(model_folder: Path, server: Running, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    mistakes: list[tuple[Path | None, dict[str, Any], tuple[str, ...]]] = [
        (tmp_path, {}, ("没有训练好的模型",)),
        (broken, {}, ("model.safetensors",)),
        (None, {}, ("没有给出模型", "--backend")),
        (model_folder, {"port": server.port}, (str(server.port), "--port 0")),
        (model_folder, {"port": 99999}, ("--port", "65535")),
        (model_folder, {"host": "no such host"}, ("--host", "127.0.0.1")),
        (model_folder, {"host": "192.0.2.1"}, ("192.0.2.1",)),
        (model_folder, {"api_key": ""}, ("--api-key",)),
        (None, {"backend": "ftp://x"}, ("--backend", "http://")),
        (None, {"backend": f"{server.url}/v2"}, ("--backend", "/v1")),
    ]
    for folder, given, words in mistakes:
        with pytest.raises(MiniGLMError) as caught:
            run(folder, **({"port": 0} | given))
        for word in words:
            assert word in str(caught.value) and "\n" not in str(caught.value)
    fails("serve", tmp_path / "none", "--port", "0", words=("none", "没有这个目录"))
    fails("serve", model_folder, MINIGLM_API_KEY="密码", words=("--api-key",))
    shutil.copytree(model_folder, tmp_path / "old" / "model")
    (tmp_path / "old" / "index").mkdir()
    (tmp_path / "old" / "index" / "index.json").write_text('{"format": 0}', "utf-8")
    fails("serve", tmp_path / "old", "--port", "0", words=("index", "读不出来"))


def test_the_engine_ends_with_a_server_that_cannot_start(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process and the thread that listens to it."""

    def stop(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("miniglm.serving.app.create_app", stop)
    threads, processes = set(threading.enumerate()), set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt):
        run(model_folder, port=0)
    assert [t.name for t in threading.enumerate() if t not in threads and t.name == "miniglm-engine"] == []
    assert set(multiprocessing.active_children()) <= processes


def test_the_servers_own_process_does_without_torch(model_folder: Path) -> None:
    """It is the engine's that needs it: 160 MB, and two seconds at the start."""
    code = """
import sys
from pathlib import Path
from miniglm.serving import app, guards, server, settings

service = server._open_service(Path(sys.argv[1]), None, None, settings.Limits(), "cpu")
app.create_app(service, service.limits, guards.State(), run=Path(sys.argv[1]))
service.close(0.0)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, str(model_folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_model_is_named_after_its_run(tmp_path: Path) -> None:
    assert model_name(tmp_path / "红楼梦") == model_name(tmp_path / "红楼梦" / "model") == "红楼梦"
