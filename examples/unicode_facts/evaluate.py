"""Ask an exported model for every name, as a user would: `python evaluate.py [MODEL]`.

Greedy decoding through memlane.LLM; an answer counts if it is the whole name and nothing else. Prints a line per
phrasing and writes JSON with the mistakes if asked to.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from data import PHRASINGS, Fact, all_facts
from memlane import LLM, SamplingParams

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "engine" / "memlane" / "demo"
GREEDY = SamplingParams(temperature=0, max_tokens=64)


def answers(llm: LLM, facts: list[Fact], phrasing: int, *, progress: bool = True) -> list[str]:
    """The model's answer to each fact's question."""
    outputs = llm.generate([fact.prompt(phrasing) for fact in facts], GREEDY, use_tqdm=progress)
    return [output.outputs[0].text for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--facts", type=int, default=0, help="ask for this many drawn at random; 0: all")
    parser.add_argument("--phrasings", type=int, nargs="*", default=list(range(len(PHRASINGS))))
    parser.add_argument("--placement", default="host", choices=("host", "disk"))
    parser.add_argument("--row-cache", default="25%")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    facts = all_facts()
    if args.facts:
        facts = [facts[i] for i in sorted(np.random.default_rng(7).permutation(len(facts))[: args.facts])]
    result: dict[str, object] = {"facts": len(facts), "placement": args.placement}
    mistakes = []
    with LLM(args.model, placement=args.placement, row_cache=args.row_cache, threads=args.threads) as llm:
        for phrasing in args.phrasings:
            start = time.monotonic()
            got = answers(llm, facts, phrasing)
            seconds = time.monotonic() - start
            wrong = [(f.prompt(phrasing), f.name, a) for f, a in zip(facts, got, strict=True) if a != f.name]
            mistakes += wrong
            match = 1 - len(wrong) / len(facts)
            result[PHRASINGS[phrasing]] = match
            print(f"{PHRASINGS[phrasing]:32} {match:.4f}   {len(facts) / seconds:.0f} answers/s", flush=True)
        for table in llm.stats().tables:
            print(table)
    if args.json:
        result["mistakes"] = [dict(zip(("question", "name", "answer"), m, strict=True)) for m in mistakes]
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
