"""Everything malformed gets a 4xx with the envelope, says what to change, and disturbs nothing."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest
from running import Server

JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "x"}


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Check the envelope; give back the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) < 10_000
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param), body
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"]
    return str(body["error"]["message"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "a",}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": -Infinity}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "infinity"),
        (b'{"prompt": "\xff\xfe"}', "UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a\x00b"}', "control character"),
        (b"[" * 50_000, "not valid JSON"),
        (b'{"prompt":' * 5_000, "not valid JSON"),
        (b"[]", "must be a JSON object, not an array"),
        (b"null", "must be a JSON object, not null"),
        (b'"a"', "must be a JSON object, not a string"),
        (b"1", "must be a JSON object, not a number"),
    ],
    ids=lambda v: str(v[:24]),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_bodies_that_are_no_json_object(http: httpx.Client, path: str, content: bytes, says: str) -> None:
    assert says in refused(http.post(path, content=content, headers=JSON), 400, "invalid_request")


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"]
)
def test_content_types(http: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = http.post("/v1/completions", content=b'{"prompt": "say:x"}', headers=headers)
    assert "application/json" in refused(response, 415, "unsupported_media_type")


def test_content_type_with_charset_is_fine(http: httpx.Client) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert http.post("/v1/completions", content=b'{"prompt": "say:x"}', headers=headers).status_code == 200


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "Field required"),
    ({"prompt": None}, "prompt", "must be a string"),
    ({"prompt": 5}, "prompt", "must be a string"),
    ({"prompt": {}}, "prompt", "must be a string"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["a", 1]}, "prompt", "element 1 is not a string"),
    ({"prompt": [1, "a"]}, "prompt", "element 1 is not a token id"),
    ({"prompt": [1, True]}, "prompt", "element 1"),
    ({"prompt": [1.5]}, "prompt", "element 0"),
    ({"prompt": [[1], 2]}, "prompt", "element 1"),
    ({"prompt": [[1], [None]]}, "prompt", "element 1"),
    ({"prompt": [260]}, "prompt", "outside the vocabulary of 260"),
    ({"prompt": [-1]}, "prompt", "outside the vocabulary"),
    ({"prompt": [2**63]}, "prompt", "outside the vocabulary"),
    ({"max_tokens": 0}, "max_tokens", "from 1"),
    ({"max_tokens": "5"}, "max_tokens", "valid integer"),
    ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"temperature": 2.1}, "temperature", "from 0 to 2"),
    ({"temperature": -0.1}, "temperature", "from 0 to 2"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.5}, "top_p", "from 0 to 1"),
    ({"top_k": -2}, "top_k", "from -1"),
    ({"min_p": 2}, "min_p", "from 0 to 1"),
    ({"n": 0}, "n", "from 1"),
    ({"n": 129}, "n", "to 128"),
    ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "from -2 to 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "from 0.01"),
    ({"seed": -1}, "seed", "from 0"),
    ({"seed": "x"}, "seed", "valid integer"),
    ({"min_tokens": 99}, "min_tokens", "from 0 to 16"),
    ({"logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "is not a token id"),
    ({"logit_bias": {"260": 1}}, "logit_bias", "outside the vocabulary"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "is not a token id"),
    ({"logit_bias": {"²": 1}}, "logit_bias", "is not a token id"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": [1]}, "logit_bias", "valid dictionary"),
    ({"stop": ""}, "stop", "must not be empty"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": [1]}, "stop", "valid string"),
    ({"stop_token_ids": [260]}, "stop_token_ids", "outside the vocabulary"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids", "valid integer"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "Extra inputs"),
    ({"stream": True, "stream_options": 1}, "stream_options", "valid dictionary"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"best_of": 3}, "best_of", "not supported"),
    ({"echo": True, "logprobs": 1}, "echo", "not supported"),
    ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "not supported"),
    ({"temprature": 1}, "temprature", "did you mean temperature?"),
    ({"zzzzzzzz": 1}, "zzzzzzzz", "unknown field"),
    ({"x" * 5000: 1}, "x" * 64, "unknown field"),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD_FIELDS, ids=lambda v: str(v)[:40])
def test_field_values(http: httpx.Client, fields: dict[str, Any], param: str, says: str) -> None:
    body = fields if "prompt" in fields or not fields else {"prompt": "say:x"} | fields
    assert says in refused(http.post("/v1/completions", json=body), 400, "invalid_request", param)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({}, "messages", "Field required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [1]}, "messages", "valid dictionary"),
        ({"messages": [{"role": "user"}]}, "messages", "content is missing"),
        ({"messages": [{"content": "x"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages", "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "messages.0.content",
        ),
        ({"messages": [USER | {"tool_calls": [{}]}]}, "messages", "tool_calls is not supported"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"messages": [USER], "tool_choice": "required"}, "tool_choice", "not supported"),
        ({"messages": [USER], "top_logprobs": 1}, "top_logprobs", "needs logprobs"),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"messages": [USER], "logprobs": 1}, "logprobs", "valid boolean"),
        ({"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "send one of them"),
        ({"messages": [USER], "chat_template": "{{ x }}"}, "chat_template", "not supported"),
        ({"messages": [USER], "prompt": "x"}, "prompt", "unknown field"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_chat_field_values(http: httpx.Client, fields: dict[str, Any], param: str, says: str) -> None:
    response = http.post("/v1/chat/completions", json=fields)
    assert says in refused(response, 400, "invalid_request", param)


def test_too_long(http: httpx.Client) -> None:
    def post(**body: Any) -> httpx.Response:
        return http.post("/v1/completions", json=body)

    for prompt in ("x" * 512, [120] * 512):
        message = refused(post(prompt=prompt), 400, "context_length_exceeded", "prompt")
        assert "512 tokens" in message
        assert "the prompt has 512" in message
    assert "at least" in refused(post(prompt="x" * 90_000), 400, "context_length_exceeded", "prompt")
    message = refused(post(prompt="x" * 500, max_tokens=13), 400, "context_length_exceeded", "max_tokens")
    assert "at most 12" in message
    assert post(prompt="x" * 511).json()["usage"]["completion_tokens"] == 1
    chat = {"messages": [{"role": "user", "content": "x" * 600}]}
    refused(http.post("/v1/chat/completions", json=chat), 400, "context_length_exceeded", "messages")
    chat = {"messages": [USER], "max_completion_tokens": 512}
    refused(
        http.post("/v1/chat/completions", json=chat), 400, "context_length_exceeded", "max_completion_tokens"
    )


def test_wrong_model(http: httpx.Client) -> None:
    chat = {"model": "gpt-5", "messages": [USER]}
    says = refused(http.post("/v1/chat/completions", json=chat), 404, "model_not_found", "model")
    assert "'gpt-5'" in says
    assert "'toy'" in says
    refused(http.post("/v1/completions", json={"model": "", "prompt": "x"}), 404, "model_not_found", "model")
    refused(http.get("/v1/models/other/name"), 404, "model_not_found", "model")
    refused(http.post("/v1/completions", json={"model": 1, "prompt": "x"}), 400, "invalid_request", "model")


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    refused(http.get("/"), 404, "not_found")
    refused(http.post("/v1/embeddings", json={}), 404, "not_found")
    refused(http.post("/v1/completions/", json={}), 404, "not_found")
    response = http.get("/v1/completions")
    refused(response, 405, "method_not_allowed")
    assert "POST" in response.headers["allow"]
    refused(http.request("BREW", "/v1/models"), 405, "method_not_allowed")


def test_large_bodies(http: httpx.Client) -> None:
    body = json.dumps({"prompt": "x" * 100_001}).encode()
    assert "100000 bytes" in refused(
        http.post("/v1/completions", content=body, headers=JSON), 413, "request_too_large"
    )
    pieces = (b"x" * 1000 for _ in range(200))  # chunked: no Content-Length to look at
    refused(http.post("/v1/completions", content=pieces, headers=JSON), 413, "request_too_large")


@pytest.mark.parametrize(
    "body",
    [
        {f"k{i}": 1 for i in range(8000)},
        {"prompt": ["a"] + [1] * 30_000},
        {"prompt": "x", "stop": [1] * 30_000},
        {"prompt": "x", "stop_token_ids": ["a"] * 20_000},
        {"prompt": "x", "logit_bias": {str(i): "x" for i in range(6000)}},
        {"prompt": "x", "y" * 90_000: 1},
        {"model": "m" * 90_000, "prompt": "x"},
        {"prompt": "x", "stop": "s" * 90_000},
    ],
    ids=lambda b: str(b)[:30],
)
def test_hostile_bodies_cost_little_and_answers_stay_small(http: httpx.Client, body: dict[str, Any]) -> None:
    begun = time.monotonic()
    response = http.post("/v1/completions", json=body)
    assert time.monotonic() - begun < 1
    assert len(response.content) < 4000
    assert response.status_code == (200 if body.get("stop") == "s" * 90_000 else response.status_code)
    assert response.status_code in (200, 400, 404)


def test_hostile_messages(http: httpx.Client) -> None:
    for messages in ([{}] * 20_000, [{"role": "user", "content": [{}] * 20_000}]):
        begun = time.monotonic()
        response = http.post("/v1/chat/completions", json={"messages": messages})
        refused(response, 400, "invalid_request", "messages")
        assert time.monotonic() - begun < 1
        assert len(response.content) < 4000


def test_control_characters_in_text_are_text(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "say:\0\x1b[31m\u2028"}).json()
    assert answer["choices"][0]["text"] == "\0\x1b[31m\u2028"


def test_tokenize(http: httpx.Client) -> None:
    def post(path: str, **body: Any) -> httpx.Response:
        return http.post(path, json=body)

    refused(post("/tokenize"), 400, "invalid_request", "prompt")
    refused(post("/tokenize", prompt="a", messages=[USER]), 400, "invalid_request", "prompt")
    refused(post("/tokenize", prompt=["a"]), 400, "invalid_request", "prompt")
    refused(post("/tokenize", prompt="a", model="b"), 404, "model_not_found", "model")
    refused(post("/detokenize"), 400, "invalid_request", "tokens")
    refused(post("/detokenize", tokens=[260]), 400, "invalid_request", "tokens")
    refused(post("/detokenize", tokens="a"), 400, "invalid_request", "tokens")


def test_too_many_answers_at_once(http: httpx.Client) -> None:
    body = {"prompt": ["say:x"] * 65}
    assert "at most 64" in refused(http.post("/v1/completions", json=body), 400, "invalid_request")


def test_broken_http_does_not_reach_us(shared: Server) -> None:
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"GARBAGE\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")


def test_a_body_that_never_comes(shared: Server) -> None:
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b'Content-Length: 100\r\n\r\n{"prompt": ')
        time.sleep(0.1)


def test_refusals_are_counted_and_nothing_is_disturbed(shared: Server) -> None:
    assert shared.client.post("/v1/completions", json={"prompt": "say:x"}).status_code == 200
    assert "Traceback" not in shared.log
    assert shared.metric("http_requests_total", handler="/v1/completions", status="4xx") > 50
    assert "5xx" not in shared.client.get("/metrics").text
