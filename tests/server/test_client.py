"""memlane_client against a running server, both clients, and against servers that misbehave."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running import Server

from memlane_client import (
    ApiError,
    AsyncMemlaneClient,
    AuthenticationFailed,
    BadRequest,
    ConnectionFailed,
    MemlaneClient,
    MemlaneError,
    NotFound,
    Overloaded,
    ServerFailed,
    Unavailable,
)
from memlane_client.core import EventReader, check
from memlane_client.types import CompletionChunk

HELLO = [{"role": "user", "content": "say:hello"}]


@pytest.fixture
def client(shared: Server) -> Iterator[MemlaneClient]:
    with MemlaneClient(shared.url) as client:
        yield client


def test_answers(client: MemlaneClient) -> None:
    assert client.ready()
    answer = client.completion("say:hi", n=2)
    assert answer.text == "hi"
    assert [c.finish_reason for c in answer.choices] == ["stop", "stop"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert client.chat(HELLO).text == "hello"
    assert client.models()[0].max_model_len == 512
    tokens = client.tokenize("hé", return_token_strs=True)
    assert client.detokenize(tokens.tokens) == "hé"
    assert client.tokenize(HELLO).count == 12


def test_streams(client: MemlaneClient) -> None:
    assert "".join(c.text for c in client.stream_completion("say:hi")) == "hi"
    chunks = list(client.stream_chat(HELLO, stream_options={"include_usage": True}))
    assert "".join(c.text for c in chunks) == "hello"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None


def test_leaving_a_stream_cancels(shared: Server, client: MemlaneClient) -> None:
    before = len([x for x in shared.received if x.startswith("abort")])
    for _ in client.stream_completion("slow:" + "x" * 100, max_tokens=100):
        break
    shared.until(lambda: len([x for x in shared.received if x.startswith("abort")]) == before + 1)


async def test_async(shared: Server) -> None:
    async with AsyncMemlaneClient(shared.url) as client:
        assert await client.ready()
        assert (await client.completion("say:hi")).text == "hi"
        assert (await client.chat(HELLO)).text == "hello"
        assert (await client.models())[0].id == "toy"
        assert await client.detokenize((await client.tokenize("x")).tokens) == "x"
        assert [c.text async for c in client.stream_completion("say:hi")] == ["h", "i", ""]
        assert "".join([c.text async for c in client.stream_chat(HELLO)]) == "hello"
        with pytest.raises(ServerFailed, match="row 7"):
            [c async for c in client.stream_completion("rows-later")]
        with pytest.raises(BadRequest):
            [c async for c in client.stream_completion("x", temperature=9)]


def test_errors(client: MemlaneClient) -> None:
    with pytest.raises(BadRequest) as bad:
        client.completion("x", temperature=9)
    assert (bad.value.status, bad.value.code, bad.value.param) == (400, "invalid_request", "temperature")
    with pytest.raises(NotFound):
        client.chat(HELLO, model="other")
    with pytest.raises(ServerFailed, match="row 7"):
        client.completion("rows")
    with pytest.raises(ServerFailed, match="row 7"):
        list(client.stream_completion("rows"))
    with pytest.raises(ServerFailed) as failed:
        list(client.stream_completion("rows-later"))
    assert failed.value.code == "rows_unreadable"


def test_starting_and_keys(toy: Path) -> None:
    (toy / "delay").write_text("1")
    with Server(toy, "--api-key", "k") as server, MemlaneClient(server.url, api_key="k") as client:
        assert not client.ready()
        with pytest.raises(Unavailable) as early:
            client.models()
        assert early.value.retry_after == 2
        server.until(client.ready)
        assert client.models()[0].id == "toy"
        with MemlaneClient(server.url, api_key="wrong") as wrong, pytest.raises(AuthenticationFailed):
            wrong.models()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = "http://{}:{}".format(*free.getsockname())
    with MemlaneClient(url) as client:
        assert not client.ready()
        with pytest.raises(ConnectionFailed):
            client.models()
        with pytest.raises(ConnectionFailed):
            list(client.stream_completion("x"))


@pytest.mark.parametrize("head", ["Content-Length: 100", "Connection: close"])
def test_a_stream_that_breaks_off(head: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\ndata: ".encode())

        thread = threading.Thread(target=serve)
        thread.start()
        url = "http://{}:{}".format(*listener.getsockname())
        with MemlaneClient(url) as client, pytest.raises(ConnectionFailed):
            list(client.stream_completion("x"))
        thread.join()


def test_answers_of_strangers() -> None:
    for status, kind in ((502, ServerFailed), (429, Overloaded), (418, BadRequest)):
        with pytest.raises(kind) as raised:
            check(httpx.Response(status, text="<html>"))
        assert isinstance(raised.value, ApiError)
        assert str(status) in str(raised.value)
    reader = EventReader(CompletionChunk)
    assert reader.line('data: {"x": 1}') is None
    with pytest.raises(MemlaneError, match="not what this client understands"):
        reader.line("")
    assert EventReader(CompletionChunk).line(": keep-alive") is None
