"""The offline API: golden vectors through it, texts, parameters, errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import memlane
from memlane import LLM, SamplingParams
from memlane.errors import CheckpointError, ConfigError, RequestError
from memlane.request import TokenDelta

DATA = Path(__file__).parents[1] / "data"
VECTORS = sorted(path.parent.relative_to(DATA) for path in DATA.glob("*/*/expected.safetensors"))
VECTORS = [path for path in VECTORS if path.name != "bf16_kernels"]  # holds kernels' results, no model
DEMO = Path(memlane.__file__).parent / "demo"

LOGITS_TOLERANCE = 2e-4


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMLANE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Golden(NamedTuple):
    checkpoint: Path
    input_ids: list[list[int]]
    logits: Tensor
    prompts: list[list[int]]
    continuations: list[list[int]]


def golden(vector: Path) -> Golden:
    expected = load_file(DATA / vector / "expected.safetensors")
    ids, logits, tokens = expected["input_ids"], expected["logits"], expected["greedy_tokens"]
    if vector.parts[0] == "smlm":
        return Golden(DATA / vector / "model", ids.tolist(), logits, ids.tolist(), tokens.tolist())
    prompts = [expected["greedy_prompt"].tolist()]
    return Golden(DATA / vector, ids.tolist(), logits, prompts, [tokens.tolist()])


@pytest.mark.parametrize("placement", ["host", "disk"])
@pytest.mark.parametrize("vector", VECTORS, ids=str)
def test_golden_vectors(vector: Path, placement: str) -> None:
    g = golden(vector)
    options = {"dtype": "float32", "block_size": 4, "max_num_batched_tokens": 10}
    with LLM(g.checkpoint, placement=placement, row_cache="2%", **options) as llm:
        for ids, expected in zip(g.input_ids, g.logits, strict=True):
            assert (llm.logits(ids) - expected).abs().max() < LOGITS_TOLERANCE
        params = SamplingParams(temperature=0, max_tokens=len(g.continuations[0]), ignore_eos=True)
        for _ in range(2):  # the second time from the prefix cache
            outputs = llm.generate(g.prompts, params, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == g.continuations
        llm.engine.check_integrity()
        for table in llm.engine.model.tables.values():
            table.check_integrity()
            if placement == "disk":
                assert table.stats().scratch_rows > 0, "the cache was meant to be too small for a step"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO, max_num_seqs=4) as llm:
        yield llm


def test_texts_come_back_in_order(llm: LLM) -> None:
    prompts = ["What is U+2603?", "a", "U+0041", "b", "c", "d"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert llm.tokenizer is not None
    for output in outputs:
        assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt or "")
        [one] = output.outputs
        assert one.finish_reason in ("stop", "length")
        shown = one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids
        assert one.text == llm.tokenizer.decode(shown)
    [alone] = llm.generate(prompts[2], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert alone.outputs == outputs[2].outputs


def test_one_prompt_of_ids_and_several(llm: LLM) -> None:
    [one] = llm.generate([1, 2, 3], SamplingParams(max_tokens=2), use_tqdm=False)
    assert (one.prompt, one.prompt_token_ids) == (None, [1, 2, 3])
    two = llm.generate([[1, 2, 3], [4]], use_tqdm=False)
    assert [output.prompt_token_ids for output in two] == [[1, 2, 3], [4]]
    assert llm.generate([], use_tqdm=False) == []


def test_choices_and_params_for_each_prompt(llm: LLM) -> None:
    params = [
        SamplingParams(n=3, seed=1, temperature=2.0, max_tokens=8, ignore_eos=True),
        SamplingParams(max_tokens=3, ignore_eos=True),
    ]
    first, second = llm.generate(["a", "b"], params, use_tqdm=False)
    assert [choice.index for choice in first.outputs] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in first.outputs}) == 3
    assert len(second.outputs) == 1
    assert len(second.outputs[0].token_ids) == 3
    with pytest.raises(RequestError, match="2 params for 1 prompts"):
        llm.generate("a", params)


def test_stop_strings_end_an_answer(llm: LLM) -> None:
    greedy = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True}
    [free] = llm.generate("What is U+2603?", SamplingParams(**greedy), use_tqdm=False)
    text = free.outputs[0].text
    stop = text[2:4]
    [cut] = llm.generate("What is U+2603?", SamplingParams(**greedy, stop=[stop]), use_tqdm=False)
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert llm.engine.unfinished == 0
    params = SamplingParams(**greedy, stop=stop, include_stop_str_in_output=True)
    [kept] = llm.generate("What is U+2603?", params, use_tqdm=False)
    assert kept.outputs[0].text == text[: text.index(stop)] + stop


def test_stop_tokens_are_named(llm: LLM) -> None:
    greedy = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    [free] = llm.generate("a", SamplingParams(**greedy), use_tqdm=False)
    stop = free.outputs[0].token_ids[2]
    [cut] = llm.generate("a", SamplingParams(**greedy, stop_token_ids=[stop]), use_tqdm=False)
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert cut.outputs[0].token_ids[-1] == stop


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=2)
    [output] = llm.generate("a", params, use_tqdm=False)
    [one] = output.outputs
    assert one.logprobs is not None
    ids = output.prompt_token_ids + one.token_ids
    expected = torch.log_softmax(llm.logits(ids), -1)[len(output.prompt_token_ids) - 1 :]
    total = 0.0
    for token, entry, row in zip(one.token_ids, one.logprobs, expected, strict=False):
        assert len(entry) == 2
        assert entry[token].rank == 1
        assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert entry[token].decoded_token is not None
        total += entry[token].logprob
    assert one.cumulative_logprob == pytest.approx(total)


def test_chat_knows_a_fact(llm: LLM) -> None:
    [output] = llm.chat(
        [{"role": "user", "content": "What is U+2603?"}], SamplingParams(temperature=0), False
    )
    assert output.outputs[0].text.strip() == "SNOWMAN"
    two = llm.chat(
        [[{"role": "user", "content": "What is U+2603?"}]] * 2, SamplingParams(temperature=0), False
    )
    assert [o.outputs[0].text for o in two] == [output.outputs[0].text] * 2


def test_stats(llm: LLM) -> None:
    llm.generate("a", use_tqdm=False)
    stats = llm.stats()
    assert stats.generation_tokens > 0
    assert stats.tables[0].counters["requested_rows"] > 0


def test_a_bad_prompt_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        llm.generate([[1, 2], [10**6]], use_tqdm=False)
    assert llm.engine.unfinished == 0
    llm.engine.check_integrity()


def test_an_interrupted_run_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[TokenDelta]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a"] * 6, use_tqdm=False)
    assert llm.engine.unfinished == 0
    assert llm.generate("a", use_tqdm=False)[0].outputs[0].token_ids


def test_models_without_a_tokenizer_take_ids_only() -> None:
    with LLM(DATA / "smlm" / "q4" / "model") as llm:
        assert llm.generate([1, 2], use_tqdm=False)[0].outputs[0].text == ""
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.generate("text")
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.generate([1, 2], SamplingParams(stop="x"))


def test_bfloat16_is_near() -> None:
    vector = golden(Path("lingua/a_memplus"))
    with LLM(vector.checkpoint, dtype="bfloat16") as llm:
        found = llm.logits(vector.input_ids[0])
        assert found.dtype == torch.float32
        error = (found - vector.logits[0]).abs().mean()
        assert 0 < error < 0.5, "logits have a standard deviation of 3"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"speed": 9}, "speed"),
        ({"placement": "moon"}, "placement"),
        ({"row_cache": "much"}, "row_cache"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"kv_cache": "1KiB", "max_model_len": 64}, "kv_cache"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        LLM(DEMO, **{"placement": "disk", **options})


def test_a_path_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        LLM(tmp_path / "nothing")


def test_automatic_choices_are_listed_with_reasons() -> None:
    with LLM(DEMO) as llm:
        lines = "\n".join(llm.engine.choices)
        for name in ("placement: host", "dtype: float32", "kv_cache: "):
            assert name in lines
    with LLM(DEMO, kv_cache="96KiB") as small:
        assert any(line.startswith("max_model_len: ") for line in small.engine.choices)
        assert small.engine.max_model_len < small.engine.model.config.max_position_embeddings
