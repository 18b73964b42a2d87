"""A server behind ours: a real one of our own, and ones that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from served import MODEL, Running, Start, until

from miniglm.serving.backend import RemoteService
from miniglm.serving.book import BookService
from miniglm.serving.service import Options, Piece, ServiceError

ASK = [{"role": "user", "content": "长江"}]


async def joined(pieces: AsyncIterator[Piece]) -> str:
    return "".join([piece.text async for piece in pieces])


def failure(pieces: AsyncIterator[Piece]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        asyncio.run(joined(pieces))
    assert "\n" not in caught.value.message and "Traceback" not in caught.value.message
    return caught.value


def test_it_says_what_the_server_says(server: Running) -> None:
    remote = RemoteService(f"{server.url}/v1/")
    for options in (Options(40), Options(40, 0.9, 0.95, 30, 1.2, 5), Options(40, stop=("是",))):
        for far, near in (
            (remote.chat(ASK, options), server.service.chat(ASK, options)),
            (remote.complete("滚滚长江", options), server.service.complete("滚滚长江", options)),
        ):

            async def both(far: AsyncIterator[Piece] = far, near: AsyncIterator[Piece] = near) -> tuple[str, str]:
                return await joined(far), await joined(near)

            said, expected = asyncio.run(both())
            assert said == expected != ""
    assert remote.model_id == MODEL


def test_pieces_come_one_by_one_and_leaving_stops_the_server(server: Running) -> None:
    async def read() -> int:
        pieces = RemoteService(f"{server.url}/v1").complete("滚滚长江", Options(1000, 1.0, seed=1))
        async for piece in pieces:
            if piece.tokens >= 3:
                break
        running = server.service.worker.running
        await pieces.aclose()  # type: ignore[attr-defined]
        return running

    assert asyncio.run(read()) == 1
    until(lambda: server.service.worker.running == 0, "the answer is dropped")


def test_a_server_with_an_index_is_asked_for_its_models_own_answer(start: Start, book: BookService) -> None:
    with start(book=book) as running:
        question = [{"role": "user", "content": "古庙里住着谁"}]

        async def both() -> tuple[str, str]:
            far = RemoteService(f"{running.url}/v1").chat(question, Options(20))
            return await joined(far), await joined(running.service.chat(question, Options(20)))

        said, expected = asyncio.run(both())
        assert said == expected and "老僧慧远" not in said


def test_a_key_is_needed(start: Start) -> None:
    with start(api_key="right") as running:
        wrong = failure(RemoteService(f"{running.url}/v1", "wrong").chat(ASK, Options()))
        assert "不接受这个密钥" in wrong.message and "wrong" not in wrong.message
        assert asyncio.run(joined(RemoteService(f"{running.url}/v1", "right").chat(ASK, Options(5))))


def test_what_the_server_refuses_is_passed_on(server: Running) -> None:
    error = failure(RemoteService(f"{server.url}/v1").chat(ASK, Options(max_tokens=10**6)))
    assert "max_tokens" in error.message and error.status == 502
    assert "没有这个地址" in failure(RemoteService(f"{server.url}/v1/x").chat(ASK, Options())).message


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = failure(RemoteService(f"http://127.0.0.1:{port}/v1").chat(ASK, Options()))
    assert error.message == f"连不上后端 http://127.0.0.1:{port}/v1，请确认它在运行"


@contextlib.contextmanager
def canned(answer: bytes) -> Iterator[str]:
    """A server that gives everybody these bytes and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(30)
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):  # closing before all is read would reset what was sent
                        pass
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):  # closing with something unread would reset the connection
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def stream(*events: str) -> bytes:
    body = "".join(f"data: {event}\n\n" for event in events)
    return f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n{body}".encode()


GOOD = '{"choices": [{"delta": {"content": "好\u2028的"}}]}'


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (stream(GOOD), "中途断开了"),
        (stream(GOOD, "nonsense"), "不是 OpenAI 的格式"),
        (stream('{"choices": [{}]}'), "不是 OpenAI 的格式"),
        (stream('{"error": {"message": "out\\nof memory"}}'), "拒绝了请求：out of memory"),
        (stream("x" * 3_000_000), "没有尽头的一行"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "中途断开了"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n", "拒绝了请求（500）"),
        (b"HTTP/1.1 429 No\r\ncontent-length: 0\r\n\r\n", "现在太忙"),
        (b"rubbish\r\n\r\n", "连接出了错"),
        (b"", "连接出了错"),
    ],
)
def test_a_server_that_misbehaves_is_one_line(answer: bytes, said: str) -> None:
    with canned(answer) as url:
        assert said in failure(RemoteService(url, model_id="m").chat(ASK, Options())).message


def test_a_whole_answer_with_an_odd_line_separator() -> None:
    last = '{"choices": [], "usage": {"completion_tokens": 1}}'
    with canned(stream('{"choices": [{"delta": {"role": "assistant"}}]}', GOOD, last, "[DONE]")) as url:
        assert asyncio.run(joined(RemoteService(url, model_id="m").chat(ASK, Options()))) == "好\u2028的"


def test_a_server_that_lists_no_model() -> None:
    with canned(b'HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{"data": []}') as url:
        assert "没有列出模型" in failure(RemoteService(url).chat(ASK, Options())).message
