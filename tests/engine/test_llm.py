"""The offline API: golden vectors through it, texts, parameters, errors."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import memlane
from memlane import LLM, SamplingParams
from memlane.errors import CheckpointError, ConfigError, ErrorKind, RequestError
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


@pytest.mark.parametrize("vector", VECTORS, ids=str)
def test_placements_agree_to_the_bit(vector: Path) -> None:
    g = golden(vector)
    with (
        LLM(g.checkpoint, placement="host") as host,
        LLM(g.checkpoint, placement="disk", row_cache="2%", max_num_batched_tokens=16) as disk,
        LLM(g.checkpoint, placement="host", max_num_batched_tokens=16) as chunked,
    ):
        for ids in g.input_ids:
            # Where a prompt is cut into steps may move a sum by a rounding, where rows come from may not.
            assert torch.equal(disk.logits(ids), chunked.logits(ids))
            assert torch.allclose(host.logits(ids), disk.logits(ids), atol=LOGITS_TOLERANCE)
        params = SamplingParams(n=2, seed=3, max_tokens=6, ignore_eos=True, logprobs=3)
        answers = [llm.generate(g.prompts, params, use_tqdm=False) for llm in (disk, chunked)]
        assert answers[0] == answers[1]  # to the last digit of each log-probability


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO, placement="disk", row_cache="5%", max_num_seqs=4) as llm:
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
    params = SamplingParams(max_tokens=1)
    for given in (np.array([1, 2, 3]), np.array([[1, 2, 3]]), torch.tensor([[1, 2, 3]])):
        [output] = llm.generate(given, params, use_tqdm=False)  # type: ignore[arg-type]
        assert output.prompt_token_ids == [1, 2, 3]
        assert {type(token) for token in output.prompt_token_ids} == {int}


@pytest.mark.parametrize(
    "prompts", [[1.5, 2], [[1, "a"]], [["What is U+2603?"]], [None], [[1], 2], torch.tensor([1, 2])], ids=str
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match="a text or a list of token ids"):
        llm.generate(prompts, use_tqdm=False)
    assert llm.engine.unfinished == 0


def test_logits_of_what_is_no_sequence(llm: LLM) -> None:
    for ids, message in (([], "empty"), ([1.5], "token ids"), ([1] * 129, "129 tokens; at most 128")):
        with pytest.raises(RequestError, match=message):
            llm.logits(ids)  # type: ignore[arg-type]


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
    with pytest.raises(RequestError, match="must be SamplingParams"):
        llm.generate("a", {"max_tokens": 3})  # type: ignore[arg-type]


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
    with pytest.raises(RequestError, match="a user message is needed"):
        llm.chat([{"role": "system", "content": "Be brief."}])


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


def test_a_prompt_that_is_too_long(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"has 801 tokens.* at most 127") as refused:
        llm.generate(["a", "x " * 400], use_tqdm=False)
    assert refused.value.kind is ErrorKind.CONTEXT_LENGTH
    assert llm.engine.unfinished == 0
    [longest] = llm.generate([5] * 127, SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert (len(longest.outputs[0].token_ids), longest.outputs[0].finish_reason) == (1, "length")


def test_an_answer_that_fails_says_why_and_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[3, 4, 5], [6, 7, 8]]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(DATA / "lingua" / "a_memplus", placement="disk", row_cache="0", max_num_seqs=1) as llm:
        good = llm.generate(prompts, params, use_tqdm=False)
        table = llm.engine.model.tables["values"]
        step = llm.engine.step

        def until_one_failed() -> list[TokenDelta]:
            deltas = step()
            if any(delta.failure for delta in deltas):
                table.source.inject_fault(0, table.rows - 1, errno.EIO, 0)
            return deltas

        monkeypatch.setattr(llm.engine, "step", until_one_failed)
        table.source.inject_fault(0, table.rows - 1, errno.EIO, 10**6)
        failed, unharmed = (output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False))
        assert (failed.finish_reason, failed.token_ids, failed.text) == ("error", [], "")
        assert "table-values.safetensors: row" in (failed.error or "")
        assert "EIO" in (failed.error or "")
        assert unharmed == good[1].outputs[0]
        llm.engine.check_integrity()
        assert llm.generate(prompts, params, use_tqdm=False) == good


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
        ({"dtype": "float64"}, "--dtype"),
        ({"row_cache": "much"}, "row_cache"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"kv_cache": "1KiB", "max_model_len": 64}, "kv_cache"),
        ({"kv_cache": "100TiB"}, "kv_cache: .* is more than"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        LLM(DEMO, **{"placement": "disk", **options})


def test_a_path_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        LLM(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("checkpoint", "file", "placement"),
    [
        (DEMO, "model.safetensors", "disk"),
        (DEMO, "table-values.safetensors", "disk"),
        (DEMO, "config.json", "host"),
        (DEMO, "tokenizer.json", "host"),
        (DATA / "lingua" / "b_pk_vanilla", "consolidated/consolidated.pth", "host"),
        (DATA / "lingua" / "f_dcp", "__0_0.distcp", "disk"),
        (DATA / "smlm" / "q4" / "model", "rest.pt", "disk"),
        (DATA / "smlm" / "q4" / "model", "values_q4.bin", "host"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_truncated_file_is_named(tmp_path: Path, checkpoint: Path, file: str, placement: str) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken")) / file
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError) as refused:
        LLM(tmp_path / "broken", placement=placement)
    assert str(broken) in str(refused.value)
    broken.write_bytes(whole)
    with LLM(tmp_path / "broken", placement=placement) as llm:  # nothing of the failure was kept
        assert llm.generate([1, 2], use_tqdm=False)[0].outputs[0].token_ids


def test_automatic_choices_are_listed_with_reasons() -> None:
    with LLM(DEMO) as llm:
        lines = "\n".join(llm.engine.choices)
        for name in ("placement: host", "dtype: float32", "kv_cache: "):
            assert name in lines
    with LLM(DEMO, kv_cache="96KiB") as small:
        assert any(line.startswith("max_model_len: ") for line in small.engine.choices)
        assert small.engine.max_model_len < small.engine.model.config.max_position_embeddings
