"""Write a run as a model directory that memlane serves: `python export.py memory-0 --to engine/memlane/demo`.

The table's rows are quantised, the dense weights stay fp32, and hot_rows.npy lists the rows by how often questions
about all facts read them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from torch import Tensor

from data import PHRASINGS, all_facts
from memlane.models import ModelConfig, Transformer
from memlane.tables import ReferenceTable, RowFormat
from memlane.tables.quantize import decode_rows, encode_rows
from memlane.tables.writer import write_table
from packing import NOT_ASKED, Batch, Corpus
from tokenizer import BOS, BOS_ID, EOS, EOS_ID, PAD
from twins import TABLE

HERE = Path(__file__).parent
CHAT_TEMPLATE = (  # one question, one answer: earlier turns and system messages were never seen in training
    "{% set questions = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% if not questions %}{{ raise_exception('a user message is needed') }}{% endif %}"
    "{{ bos_token }}{{ questions[-1]['content'] | trim }}"
)


class CountingTable(ReferenceTable):
    """Counts how often each row is read; a node shared by several questions counts once for each."""

    def start(self) -> None:
        self.reads = np.zeros(self.rows, np.int64)
        self.shared_by = np.ones(0, np.int64)

    def weighted_sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        times = np.repeat(self.shared_by, ids.shape[1])
        self.reads += np.bincount(ids.numpy().ravel(), weights=times, minlength=self.rows).astype(np.int64)
        return super().weighted_sum(ids, weights)


@torch.inference_mode()
def measure(model: Transformer, table: CountingTable | None, corpus: Corpus) -> float:
    """Exact match over all facts, each asked in a phrasing drawn at random, on the served modules."""
    facts = len(corpus.facts)
    phrasings = np.random.default_rng(11).integers(len(PHRASINGS), size=facts)
    right = np.ones(facts, bool)
    for at in range(0, facts, 512):
        numbers = np.arange(at, min(at + 512, facts))
        batch = corpus.pack(numbers, phrasings[numbers])
        if table is not None:
            table.shared_by = _shared_by(batch)
        hidden = model(batch.token_ids, batch.positions, batch.attention)
        wrong = (model.logits(hidden[batch.answer_nodes]).argmax(-1) != batch.targets) & (
            batch.targets != NOT_ASKED
        )
        right[at + batch.sequences[wrong].numpy()] = False
    return float(right.mean())


def _shared_by(batch: Batch) -> np.ndarray:
    path = batch.path.numpy()
    last = np.maximum.accumulate(path > 0, axis=1)  # node 0 starts the first path; elsewhere 0 is padding
    used = np.flip(np.maximum.accumulate(np.flip(path > 0, 1), axis=1), 1) | ~last
    return np.bincount(path[used], minlength=len(batch.token_ids)).astype(np.int64)


def export(run: Path, destination: Path, row_format: RowFormat) -> float:
    """Write run's checkpoint to destination, replacing it. Returns the exact match of what was written."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    config = ModelConfig.from_dict(state["config"])
    assert config.memory is not None, "the dense twin has no table to serve"
    config = dataclasses.replace(
        config, memory=dataclasses.replace(config.memory, row_format=row_format.value)
    )
    stored = encode_rows(state["table"]["values"], row_format)
    assert config.memory is not None
    width = config.memory.value_dim
    table = CountingTable.from_tensor(decode_rows(stored, row_format, width), name=TABLE)
    assert isinstance(table, CountingTable)
    table.start()
    model = Transformer(config, {TABLE: table})
    model.load_state_dict(state["model"])
    corpus = Corpus(all_facts(), Tokenizer.from_file(str(run / "tokenizer.json")))
    match = measure(model, table, corpus)

    work = destination.with_name(destination.name + ".new")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    save_file(dict(model.state_dict()), work / "model.safetensors", metadata={"format": "pt"})
    write_table(work / f"table-{TABLE}.safetensors", TABLE, config.memory.rows, width, row_format, [stored])
    order = np.argsort(-table.reads, kind="stable")
    np.save(work / "hot_rows.npy", order[table.reads[order] > 0].astype(np.int64))
    _write_tokenizer(run, work)
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "temperature": 0.0, "max_new_tokens": 64}
    _write_json(work / "generation_config.json", generation)
    (work / "README.md").write_text(_card(config, state["done"], len(corpus.facts), match, row_format))
    (work / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(work.iterdir())}
    _write_json(work / "memlane-checksums.json", sums)
    _write_json(work / "config.json", config.to_dict())  # last: without it a folder is not a model
    shutil.rmtree(destination, ignore_errors=True)
    work.rename(destination)
    return match


def _write_tokenizer(run: Path, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _card(config: ModelConfig, steps: int, facts: int, match: float, row_format: RowFormat) -> str:
    memory = config.memory
    assert memory is not None
    questions = "\n".join(f"- `{phrasing % 0x2603}`" for phrasing in PHRASINGS)
    return f"""# unicode-facts

A memory-layer model that recalls the names of {facts:,} Unicode characters, and nothing else. It answers with the name:

{questions}

Chat: the last user message is the question. Code points are written as U+ and upper-case hexadecimal digits.

{config.num_layers} blocks of width {config.hidden_size}; memory layers {list(memory.layers)} share one table of
{memory.rows:,} rows x {memory.value_dim} ({row_format.value}), {memory.num_heads} heads x {memory.knn} rows a token.
Trained for {steps:,} steps. It gives the exact name of {100 * match:.2f} % of the characters it was trained on.

How it was trained, its dense twin and the measurements: examples/unicode_facts in the source tree.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run", help="folder of the run under --runs")
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--to", type=Path, default=HERE.parents[1] / "engine" / "memlane" / "demo")
    parser.add_argument("--rows", choices=[f.value for f in RowFormat], default=RowFormat.INT8.value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    match = export(args.runs / args.run, args.to, RowFormat(args.rows))
    size = sum(p.stat().st_size for p in args.to.iterdir())
    print(f"{args.to}: exact match {match:.4f}, {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
