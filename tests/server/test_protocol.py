"""Answers of the endpoints: exact fields, streaming and not."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events; the last must be [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    assert all(f.startswith("data: ") for f in frames)
    data = [f.removeprefix("data: ") for f in frames]
    assert data.pop() == "[DONE]"
    return [json.loads(d) for d in data]


def complete(http: httpx.Client, **body: Any) -> Any:
    response = http.post("/v1/completions", json={"model": "toy"} | body)
    assert response.status_code == 200, response.text
    return response.json()


def test_completion(http: httpx.Client) -> None:
    body = complete(http, prompt="say:héllo")
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "toy")
    assert body["choices"] == [
        {"index": 0, "text": "héllo", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert body["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 7,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_prompt_forms_and_n(http: httpx.Client) -> None:
    ids = list(b"say:x")
    for prompt in ("say:x", ids, ["say:x"], [ids]):
        assert complete(http, prompt=prompt)["choices"][0]["text"] == "x"
    body = complete(http, prompt=["say:a", "say:b"], n=2)
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert body["usage"]["prompt_tokens"] == 10
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_lengths(http: httpx.Client) -> None:
    body = complete(http, prompt="abc")
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"
    assert complete(http, prompt="abc", max_tokens=509)["usage"]["total_tokens"] == 512
    chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "abc"}]}).json()
    assert chat["usage"]["total_tokens"] == 512


def test_echo(http: httpx.Client) -> None:
    assert complete(http, prompt="say:x", echo=True)["choices"][0]["text"] == "say:xx"
    chunks = events(http.post("/v1/completions", json={"prompt": "say:x", "echo": True, "stream": True}))
    assert "".join(c["choices"][0]["text"] for c in chunks) == "say:xx"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_the_text_and_the_usage(http: httpx.Client, stream: bool) -> None:
    body = {"prompt": "say:one two three", "stop": ["two", "zzz"], "stream": stream}
    if stream:
        chunks = events(http.post("/v1/completions", json=body | {"stream_options": {"include_usage": True}}))
        usage = chunks.pop()["usage"]
        text = "".join(c["choices"][0]["text"] for c in chunks)
        last = chunks[-1]["choices"][0]
    else:
        answer = complete(http, **body)
        usage, last = answer["usage"], answer["choices"][0]
        text = last["text"]
    assert text == "one "
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "two")
    assert usage["completion_tokens"] == 7
    kept = complete(http, prompt="say:one two three", stop="two", include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == "one two"


def test_completion_logprobs(http: httpx.Client) -> None:
    logprobs = complete(http, prompt="say:é!", logprobs=1)["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", "!", "<|end|>"],
        "token_logprobs": [-0.25] * 4,
        "top_logprobs": [{"\0": -0.5, t: -0.25} for t in ["bytes:\\xc3", "bytes:\\xa9", "!", "<|end|>"]],
        "text_offset": [0, 0, 1, 2],
    }


def test_chat(http: httpx.Client) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "say:"}, {"type": "text", "text": "hi"}]}
    ]
    body = http.post("/v1/chat/completions", json={"model": "toy", "messages": messages}).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hi", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]


def test_chat_stream(http: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "say:hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "somebody",
        "tools": [],
        "response_format": {"type": "text"},
    }
    chunks = events(http.post("/v1/chat/completions", json=body))
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "h"}, {"content": "i"}, {}]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, "stop"]


def test_chat_logprobs(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "say:h"}], "logprobs": True, "top_logprobs": 1}
    content = http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "h",
        "logprob": -0.25,
        "bytes": [104],
        "top_logprobs": [{"token": "\0", "logprob": -0.5, "bytes": [0]}],
    }


def test_an_answer_can_be_sent_back(http: httpx.Client) -> None:
    first = http.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "say:a"}]}
    ).json()
    messages = [
        {"role": "user", "content": "say:a"},
        first["choices"][0]["message"] | {"tool_calls": None, "annotations": []},
        {"role": "user", "content": "b"},
    ]
    assert http.post("/v1/chat/completions", json={"messages": messages}).status_code == 200


def test_running_usage_and_token_ids(http: httpx.Client) -> None:
    body = {
        "prompt": "say:ab",
        "stream": True,
        "stream_options": {"continuous_usage_stats": True},
        "return_token_ids": True,
    }
    chunks = events(http.post("/v1/completions", json=body))
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3]
    assert [c["choices"][0]["token_ids"] for c in chunks] == [[97], [98], [256]]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == list(b"say:ab")


def test_models(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    [card] = listed["data"]
    assert set(card) == {
        "id",
        "object",
        "created",
        "owned_by",
        "root",
        "parent",
        "max_model_len",
        "permission",
    }
    assert (card["id"], card["object"], card["max_model_len"]) == ("toy", "model", 512)
    assert card["root"] == "toy", "paths of the server are not told"
    assert http.get("/v1/models/toy").json() == card


def test_tokenize_and_back(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [104, 195, 169],
        "token_strs": ["h", "�", "�"],
    }
    assert http.post("/detokenize", json={"tokens": [104, 195, 169]}).json() == {"prompt": "hé"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "h"}]}).json()
    assert chat["tokens"] == [257, 104, 256, 258]
    without = {"messages": [{"role": "user", "content": "h"}], "add_generation_prompt": False}
    assert http.post("/tokenize", json=without).json()["count"] == 3


def test_operations(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").status_code == 200
    assert set(http.get("/version").json()) == {"version"}
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")


def test_request_ids(http: httpx.Client) -> None:
    assert http.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert len(http.get("/health", headers={"x-request-id": "a b" * 99}).headers["x-request-id"]) == 32


def test_openapi_describes_bodies_and_errors(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    assert "messages" in document["components"]["schemas"]["ChatRequest"]["required"]
    assert http.get("/openapi.json").json() == document
