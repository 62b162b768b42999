"""The official `openai` package against us: what people will really use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from running import Server

MESSAGES = [{"role": "user", "content": "say:hello"}]


@pytest.fixture
def client(shared: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=shared.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="toy", prompt="say:hi", logprobs=1)
    assert answer.choices[0].text == "hi"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["h", "i", "<|end|>"]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 9


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="toy",
        messages=MESSAGES,
        logprobs=True,
        top_logprobs=2,
        seed=1,
        max_completion_tokens=20,
        stop=["x"],
    )  # type: ignore[call-overload]
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[0].top_logprobs[1].logprob == pytest.approx(-0.501)
    again = client.chat.completions.create(
        model="toy", messages=[*MESSAGES, answer.choices[0].message, MESSAGES[0]]
    )
    assert again.object == "chat.completion"


def test_streams(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="toy", prompt="say:hi", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "hi"
    chat = client.chat.completions.create(
        model="toy",
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},  # type: ignore[call-overload]
    )
    chunks = list(chat)
    assert chunks[-1].usage.completion_tokens == 6
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello"


def test_the_streaming_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="toy", messages=MESSAGES) as stream:  # type: ignore[arg-type]
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "hello"


async def test_async(shared: Server) -> None:
    async with openai.AsyncOpenAI(base_url=shared.url + "/v1", api_key="none") as client:
        answer = await client.chat.completions.create(model="toy", messages=MESSAGES)  # type: ignore[arg-type]
        assert answer.choices[0].message.content == "hello"
        stream = await client.completions.create(model="toy", prompt="say:hi", stream=True)
        assert [chunk.choices[0].text async for chunk in stream] == ["h", "i", ""]


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "memlane"


def test_error_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="toy", prompt="x", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.InternalServerError, match="row 7"):
        client.completions.create(model="toy", prompt="rows")
    with pytest.raises(openai.APIError, match="row 7"):
        list(client.completions.create(model="toy", prompt="rows-later", stream=True))


def test_keys_and_retries(toy: Path) -> None:
    with Server(toy, "--api-key", "right", "--max-queued-requests", "1") as server:
        server.until(lambda: server.client.get("/ready").status_code == 200, 20)
        wrong = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        right = openai.OpenAI(base_url=server.url + "/v1", api_key="right", max_retries=0)
        running = right.completions.create(model="toy", prompt="slow:" + "x" * 30, max_tokens=40, stream=True)
        next(running)
        with pytest.raises(openai.RateLimitError):
            right.completions.create(model="toy", prompt="say:hi")
        patient = right.with_options(max_retries=5)
        assert patient.completions.create(model="toy", prompt="say:hi").choices[0].text == "hi"
        running.close()
