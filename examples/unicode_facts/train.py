"""Train one twin: `python train.py --name memory-0`, `python train.py --name dense-0 --dense`. Resumes by itself.

A run lives in runs/NAME: arguments and tokenizer as they were, log.jsonl (one line per report), checkpoint.pt.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import nn

from data import PHRASINGS, Exposures, all_facts
from memlane.models.transformer import Transformer
from ops import HeadLoss
from packing import NOT_ASKED, Corpus
from tokenizer import train_tokenizer
from twins import build, flops_per_token, model_config

HERE = Path(__file__).parent


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--name", required=True, help="folder of the run under --runs")
    add("--runs", type=Path, default=HERE / "runs")
    add("--dense", action="store_true", help="train the dense twin")
    add("--seed", type=int, default=0, help="of initial weights and data order")
    add("--steps", type=int, default=16000)
    add("--batch", type=int, default=128)
    add("--facts", type=int, default=0, help="train on this many facts drawn at random; 0: all")
    add("--vocabulary", type=int, default=2048)
    add("--lr", type=float, default=4e-3, help="of the dense parameters")
    add("--table-lr", type=float, default=1e-2, help="of the value table")
    add("--warmup", type=int, default=200, help="steps")
    add("--final", type=float, default=0.02, help="last learning rate over the first")
    add("--decay", type=float, default=0.01, help="weight decay of matrices")
    add("--heads", type=int, default=2, help="memory heads")
    add("--knn", type=int, default=16, help="rows per memory head")
    add("--width", type=int, default=128)
    add(
        "--hidden",
        type=int,
        default=512,
        help="SwiGLU width beside the memory layers; the dense twin's follows",
    )
    add(
        "--precision",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of matrix products in training",
    )
    add("--report", type=int, default=250, help="steps between reports")
    add("--save-minutes", type=float, default=3.0)
    add("--evaluate", type=int, default=1000, help="facts asked at each report")
    add("--stop", type=int, default=0, help="leave after this step as if interrupted; 0: never")
    return p.parse_args(argv)


class Run:
    """One training run: model, optimisers, data stream and the step they have reached."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        facts = all_facts()
        self.tokenizer = train_tokenizer(facts, args.vocabulary)
        if args.facts:
            keep = np.random.default_rng(1234).permutation(len(facts))[: args.facts]
            facts = [facts[i] for i in sorted(keep)]
        self.corpus = Corpus(facts, self.tokenizer)
        self.exposures = Exposures(len(facts), args.seed)
        self.config = model_config(
            self.tokenizer.get_vocab_size(),
            dense=args.dense,
            heads=args.heads,
            knn=args.knn,
            width=args.width,
            hidden=args.hidden,
        )
        self.model, self.table = build(self.config, args.seed, bfloat16=args.precision == "bfloat16")
        self.optimizer = torch.optim.AdamW(
            _groups(self.model, args.decay), lr=args.lr, betas=(0.9, 0.98), fused=True
        )
        self.done = 0
        self.seconds = self.reported_seconds = 0.0  # of training, without reports
        self.cpu_seconds = 0.0  # of earlier processes of this run

    def rate(self, step: int) -> float:
        """Learning-rate factor: linear warm-up, cosine to `final`."""
        a = self.args
        cosine = 0.5 * (1 + math.cos(math.pi * step / a.steps))
        return min(1.0, (step + 1) / a.warmup) * float(a.final + (1 - a.final) * cosine)

    def step(self) -> tuple[float, int]:
        """One optimiser step. Returns the loss per answer token (nats) and the tokens computed."""
        a = self.args
        batch = self.corpus.pack(*self.exposures.batch(self.done, a.batch))
        rate = self.rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = a.lr * rate
        hidden = self.model(batch.token_ids, batch.positions, batch.attention)
        loss = HeadLoss.apply(
            hidden[batch.answer_nodes], self.model.embed.weight, batch.targets, getattr(torch, a.precision)
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.table is not None:
            self.table.adam(a.table_lr * rate, 0.9, 0.98)
        self.done += 1
        return loss.item(), len(batch.token_ids)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "table": self.table.state_dict() if self.table is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds + time.process_time(),
            "config": self.config.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.table is not None:
            self.table.load_state_dict(state["table"])
        self.done, self.seconds, self.cpu_seconds = state["done"], state["seconds"], state["cpu_seconds"]
        self.reported_seconds = self.seconds


def _groups(model: Transformer, decay: float) -> list[dict[str, Any]]:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2]  # norms, biases, product keys
    return [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


@torch.no_grad()
def exact_match(model: Transformer, corpus: Corpus, facts: np.ndarray, phrasings: np.ndarray) -> np.ndarray:
    """bool [n]: is every answer token the most likely one? The same as greedy decoding giving the whole name."""
    right = np.ones(len(facts), bool)
    for at in range(0, len(facts), 512):
        batch = corpus.pack(facts[at : at + 512], phrasings[at : at + 512])
        hidden = model(batch.token_ids, batch.positions, batch.attention)
        wrong = (model.logits(hidden[batch.answer_nodes]).argmax(-1) != batch.targets) & (
            batch.targets != NOT_ASKED
        )
        right[at + batch.sequences[wrong].numpy()] = False
    return right


def save(run: Run, folder: Path) -> None:
    """Write checkpoint.pt whole or not at all."""
    torch.save(run.state_dict(), folder / "checkpoint.new")
    (folder / "checkpoint.new").replace(folder / "checkpoint.pt")


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)  # a run owns one core; two runs side by side use two
    folder = args.runs / args.name
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    run.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "arguments.json").write_text(json.dumps(vars(args), default=str, indent=1))
    if (folder / "checkpoint.pt").exists():
        run.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True))
        _forget_lost_reports(folder / "log.jsonl", run.done)
        print(f"resumed at step {run.done}", flush=True)
    facts = len(run.corpus.facts)
    dense = sum(p.numel() for p in run.model.parameters())
    print(f"{facts} facts, {dense} dense parameters, table {0 if run.table is None else run.table.values.numel()}, "
          f"{flops_per_token(run.config)} FLOPs a token", flush=True)  # fmt: skip
    draw = np.random.default_rng(7)
    asked = draw.permutation(facts)[: args.evaluate]
    phrasings = draw.integers(len(PHRASINGS), size=len(asked))
    train(run, folder, asked, phrasings)


def _forget_lost_reports(log: Path, done: int) -> None:
    """Drop reports of steps after the checkpoint: they are about to be made again."""
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= done))


def train(run: Run, folder: Path, asked: np.ndarray, phrasings: np.ndarray) -> None:
    """Train to the end, reporting exact match on the questions (asked, phrasings). SIGTERM saves and leaves."""
    args, facts = run.args, len(run.corpus.facts)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    end = args.stop or args.steps
    with (folder / "log.jsonl").open("a") as log:
        losses, tokens = [], 0
        mark = saved = time.monotonic()
        while run.done < end and not stopped.is_set():
            loss, computed = run.step()
            now = time.monotonic()
            run.seconds += now - mark
            mark = now
            losses.append(loss)
            tokens += computed
            if run.done % args.report == 0 or run.done == end:
                right = exact_match(run.model, run.corpus, asked, phrasings).mean()
                report(run, log, losses, tokens, float(right))
                losses, tokens = [], 0
            if time.monotonic() - saved > 60 * args.save_minutes:
                save(run, folder)
                saved = time.monotonic()
            mark += time.monotonic() - now  # reports and checkpoints are not training
        save(run, folder)
        if run.done == args.steps:
            right_by_phrasing = [
                float(exact_match(run.model, run.corpus, np.arange(facts), np.full(facts, p)).mean())
                for p in range(len(PHRASINGS))
            ]
            final = {"final": True, "step": run.done, "seconds": round(run.seconds, 1),
                     "cpu_seconds": round(run.cpu_seconds + time.process_time(), 1),
                     "exact_match_by_phrasing": right_by_phrasing,
                     "exact_match": float(np.mean(right_by_phrasing))}  # fmt: skip
            log.write(json.dumps(final) + "\n")
            print(json.dumps(final), flush=True)


def report(run: Run, log: TextIO, losses: list[float], tokens: int, exact: float) -> None:
    """One line to the log and to the terminal: means over the steps since the last report."""
    took = max(run.seconds - run.reported_seconds, 1e-9)
    run.reported_seconds = run.seconds
    line = {
        "step": run.done,
        "exposures": round(run.done * run.args.batch / len(run.corpus.facts), 3),
        "loss": round(float(np.mean(losses)), 5),
        "exact_match": round(exact, 5),
        "rate": round(run.rate(run.done), 4),
        "seconds": round(run.seconds, 1),
        "cpu_seconds": round(run.cpu_seconds + time.process_time(), 1),
        "samples_per_second": round(len(losses) * run.args.batch / took, 1),
        "tokens_per_second": round(tokens / took),
    }
    if run.table is not None:
        line["rows_used"] = round((run.table.steps > 0).float().mean().item(), 4)
    left = (run.args.steps - run.done) * took / len(losses)
    log.write(json.dumps(line) + "\n")
    log.flush()
    print(json.dumps(line), f"{left / 60:.0f} min left", flush=True)


if __name__ == "__main__":
    main()
