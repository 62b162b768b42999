from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from memlane.errors import ErrorKind, RequestError
from memlane.ipc import (
    Abort,
    Add,
    Deltas,
    Drain,
    Fatal,
    Ready,
    Stats,
    TableStats,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from memlane.request import Failure, FinishReason, RequestTiming, SamplingParams, TokenDelta, TokenLogprobs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", True),
        ("n", 129),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("min_tokens", 17),  # more than max_tokens
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("seed", -1),
        ("seed", 2**63),
        ("logprobs", 21),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {-5: 1.0}),
        ("stop", ["a"] * 17),
        ("stop", [""]),
        ("stop", [1]),
        ("stop_token_ids", [-1]),
    ],
)
def test_values_that_make_no_sense_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert caught.value.kind is ErrorKind.INVALID_REQUEST


def test_one_stop_string_need_not_be_a_list() -> None:
    assert SamplingParams(stop="\n").stop == ["\n"]  # type: ignore[arg-type]


def test_choices_differ_by_seed_and_stay_in_range() -> None:
    params = SamplingParams(n=3, seed=2**63 - 1)
    assert [params.for_choice(i).seed for i in range(3)] == [2**63 - 1, 0, 1]
    assert params.for_choice(1).n == 1
    assert SamplingParams(n=2).for_choice(1).seed is None


TO_ENGINE = [
    Add(request_id="a", prompt_token_ids=[1, 2], params=SamplingParams(logit_bias={3: -1.0}, stop=["x"])),
    Abort(["a", "b"]),
    Drain(),
]
FROM_ENGINE = [
    Ready(
        model_directory="m",
        vocab_size=10,
        max_model_len=20,
        kv_blocks=3,
        block_size=16,
        choices=["dtype float32: CPU"],
        resident_bytes=1,
    ),
    Deltas(
        [
            TokenDelta(request_id="a", token_ids=[5], logprobs=[TokenLogprobs(5, -0.5, 1, [(5, -0.5)])]),
            TokenDelta(
                request_id="a",
                finish_reason=FinishReason.ERROR,
                failure=Failure(ErrorKind.ROWS_UNREADABLE, "row 3"),
                timing=RequestTiming(queue=0.1, prefill=0.2, decode=0.3),
            ),
        ]
    ),
    Stats(
        running=1,
        waiting=0,
        kv_blocks_used=1,
        kv_blocks_total=2,
        prefix_cache_queries=0,
        prefix_cache_hits=0,
        preemptions=0,
        steps=1,
        step_tokens=[4],
        prompt_tokens=4,
        generation_tokens=0,
        tables=[TableStats(table="values", tier="disk", counters={"hits": 1.0}, gauges={})],
        resident_bytes=1,
    ),
    Fatal("no such file"),
]


@pytest.mark.parametrize("message", TO_ENGINE, ids=lambda m: type(m).__name__)
def test_messages_to_the_engine_survive_the_wire(message: Any) -> None:
    assert decode_to_engine(encode(message)) == message


@pytest.mark.parametrize("message", FROM_ENGINE, ids=lambda m: type(m).__name__)
def test_messages_from_the_engine_survive_the_wire(message: Any) -> None:
    assert decode_from_engine(encode(message)) == message


def test_a_frame_of_somebody_else_is_an_error() -> None:
    for frame in (b"", b"\xff\x00", encode(Fatal("x"))):
        with pytest.raises(msgspec.DecodeError):
            decode_to_engine(frame)
