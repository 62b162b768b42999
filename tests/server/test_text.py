"""Tokeniser and detokeniser against their slow twins, and chat templates."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import byte_level, sentencepiece_like, write

from memlane.errors import CheckpointError, ConfigError, RequestError
from memlane.text import ChatTemplate, Detokenizer, Tokenizer

MERGES = ("a b", "b c", "ab c", "ã ģ", "Ġ a")


def make(spec: dict[str, object]) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))


BYTES = make(byte_level(MERGES))
SENTENCEPIECE = make(sentencepiece_like())


def slow_text(token_ids: list[int], stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The twin: decode everything, then look at each prefix of the text for a stop string at its end."""
    text = BYTES.decode(token_ids)
    for end in range(1, len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            stop = max(complete, key=len)
            return (text[:end] if include_stop else text[: end - len(stop)]), stop
    return text, None


tokens = st.lists(st.one_of(st.integers(0, 255), st.sampled_from([97, 98, 99, 256, 257, 258, 259, 0xE2])))
stops = st.lists(st.text(alphabet="abc é", min_size=1, max_size=5), max_size=4)


@settings(max_examples=300, deadline=None)
@given(tokens, stops, st.booleans(), st.data())
def test_incremental_text_equals_decoding_everything(
    token_ids: list[int], stop: list[str], include: bool, data: st.DataObject
) -> None:
    detokenizer = Detokenizer(BYTES, stop, include_stop=include)
    shown, position = "", 0
    while position < len(token_ids):
        step = data.draw(st.integers(1, 4))
        shown += detokenizer.push(token_ids[position : position + step])
        position += step
        full, _ = slow_text(token_ids, stop, include)
        assert full.startswith(shown), "shown text must be final"
    shown += detokenizer.finish()
    assert (shown, detokenizer.stopped) == slow_text(token_ids, stop, include)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 264)))
def test_decode_equals_the_library(token_ids: list[int]) -> None:
    backend = tokenizers.Tokenizer.from_str(json.dumps(byte_level(MERGES)))
    for skip in (True, False):
        expected = backend.decode(token_ids, skip_special_tokens=skip)
        assert BYTES.decode(token_ids, skip_special_tokens=skip) == expected


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_text_survives_both_ways(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text), skip_special_tokens=False) == text
    backend = tokenizers.Tokenizer.from_str(json.dumps(sentencepiece_like()))
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode(text)) == backend.decode(backend.encode(text).ids)


def test_an_answer_keeps_the_space_at_its_beginning() -> None:
    ids = [SENTENCEPIECE.token_id("▁a")]
    assert SENTENCEPIECE.decode(ids) == "a"
    assert Detokenizer(SENTENCEPIECE).push(ids) == " a"


def test_characters_are_shown_whole() -> None:
    detokenizer = Detokenizer(BYTES)
    shown = [detokenizer.push([b]) for b in "é☃𝄞".encode()]
    assert shown == ["", "é", "", "", "☃", "", "", "", "𝄞"]
    assert detokenizer.push([0xE2, 0x98]) == ""
    assert detokenizer.finish() == "�"


def test_a_possible_stop_string_is_held_back_and_released() -> None:
    detokenizer = Detokenizer(BYTES, ["abcd"])
    assert [detokenizer.push([t]) for t in b"xabc"] == ["x", "", "", ""]
    assert detokenizer.push(list(b"abcX")) == "abcabcX"
    assert detokenizer.push(list(b"zabcdef")) == "z"
    assert detokenizer.stopped == "abcd"
    assert detokenizer.token_count == 4 + 4 + 5
    assert detokenizer.push([97]) == detokenizer.finish() == ""


def test_a_stop_token_is_hidden_unless_asked_for() -> None:
    assert Detokenizer(BYTES).push([97, 10], ended_by_last=True) == "a"
    assert Detokenizer(BYTES, include_stop=True).push([97, 10], ended_by_last=True) == "a\n"
    shown = Detokenizer(BYTES, skip_special_tokens=False, include_stop=True)
    assert shown.push([97, 261], ended_by_last=True) == "a<|end|>"


def test_stop_strings_wait_for_min_tokens() -> None:
    detokenizer = Detokenizer(BYTES, ["a"], min_tokens=2)
    assert detokenizer.push(list(b"aaba")) == "aab"
    assert detokenizer.token_count == 4


def test_long_answers_cost_linear_time() -> None:
    def seconds(n: int) -> float:
        detokenizer = Detokenizer(BYTES, ["a" * 1000 + "b"] * 4)
        begin = time.perf_counter()
        for _ in range(n):
            detokenizer.push([97])
        return time.perf_counter() - begin

    seconds(1000)
    assert seconds(40_000) < 40 * max(seconds(4_000), 0.004)


def test_random_stop_searches_never_look_back() -> None:
    rng = random.Random(1)
    for _ in range(300):
        stop = ["".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
        ids = rng.choices([97, 98, 256], k=40)
        detokenizer = Detokenizer(BYTES, stop)
        shown = "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish()
        assert (shown, detokenizer.stopped) == slow_text(ids, stop, False)


def test_loading(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", byte_level())
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("<|user|>hé") == [257, 104, 0xC3, 0xA9]
    assert tokenizer.vocab_size == 260
    assert tokenizer.eos_token_id == 256
    assert tokenizer.bos_token_id is None
    assert tokenizer.chat_template
    assert tokenizer.token_strings([0xC3, 999]) == ["�", ""]
    assert Tokenizer.load(directory / "tokenizer.json").vocab_size == 260
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert Tokenizer.load(directory).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("content", "defect"),
    [
        ("{", "not a usable tokenizer.json"),
        (
            json.dumps(byte_level() | {"decoder": {"type": "WordPiece", "prefix": "#", "cleanup": True}}),
            "WordPiece",
        ),
        (json.dumps(byte_level() | {"decoder": None}), "no decoder"),
    ],
)
def test_unusable_tokenisers_name_the_file_and_the_defect(tmp_path: Path, content: str, defect: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=defect) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_missing_tokeniser(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        Tokenizer.load(tmp_path)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        BYTES.encode("a\ud800")


def test_chat_template_sees_messages_and_special_tokens() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{% generation %}[{{ m['role'] }}:{{ m.content | tojson }}]"
        "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ mood }}",
        special_tokens={"bos_token": "<s>", "eos_token": None},
    )
    messages = [{"role": "user", "content": "<é>"}]
    assert template.render(messages, mood="!") == '<s>[user:"<é>"]>!'
    assert template.render(messages, add_generation_prompt=False) == '<s>[user:"<é>"]'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.x }}",
    ],
)
def test_chat_template_failures_are_the_requests_fault(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_broken_templates_are_found_when_loaded() -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        ChatTemplate("{% for %}")
