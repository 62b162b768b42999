"""Random bodies: whatever is sent, the answer is 200 or a 4xx with the envelope."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import Server

from memlane_server.protocol.chat import ChatRequest
from memlane_server.protocol.completions import CompletionRequest
from memlane_server.protocol.tokenize import TokenizeRequest

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(-2, 3), st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4) | st.just("1"), inner, max_size=3)
    ),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": values}),
    max_size=2,
)
KINDS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path = draw(st.sampled_from(sorted(KINDS)))
    names = sorted({*KINDS[path].model_fields, *KINDS[path].no_op} - {"stream", "model"})
    chosen = draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
    body: dict[str, Any] = (
        {"messages": [{"role": "user", "content": "say:x"}]} if "chat" in path else {"prompt": "say:x"}
    )
    return path, body | {name: draw(messages if name == "messages" else values) for name in chosen}


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests())
def test_no_body_makes_the_server_fail(shared: Server, request_: tuple[str, dict[str, Any]]) -> None:
    path, body = request_
    try:
        response = shared.client.post(path, json=body)
    except (UnicodeEncodeError, ValueError):
        return  # the client cannot even write it
    assert response.status_code == 200 or 400 <= response.status_code < 429, (response.text, body)
    if not response.is_success:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert len(response.content) < 4000
