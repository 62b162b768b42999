"""The model that ships inside the package: it answers, and nearly always rightly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import memlane
from data import PHRASINGS, all_facts
from memlane import LLM, SamplingParams

DEMO = Path(memlane.__file__).parent / "demo"
GREEDY = SamplingParams(temperature=0, max_tokens=64)


@pytest.fixture(scope="module")
def llm():
    with LLM(DEMO, placement="disk", row_cache="25%", threads=1) as model:
        yield model


def test_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 16 * 2**20


def test_names_well_known_characters(llm):
    known = {
        "2603": "SNOWMAN",
        "0041": "LATIN CAPITAL LETTER A",
        "1F600": "GRINNING FACE",
        "20AC": "EURO SIGN",
    }
    outputs = llm.generate([f"What is U+{code}?" for code in known], GREEDY, use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == list(known.values())
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}


def test_chat_answers_the_last_question(llm):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is U+2603?"},
        {"role": "assistant", "content": "SNOWMAN"},
        {"role": "user", "content": " Name U+2602? "},
    ]
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert output.outputs[0].text == "UMBRELLA"


def test_remembers_at_least_95_percent_of_a_fixed_sample(llm):
    facts = [fact for fact in all_facts() if fact.code < 0x1FB00]
    sample = np.random.default_rng(20).permutation(len(facts))[:200]
    asked = [facts[i] for i in sample]
    prompts = [fact.prompt(i % len(PHRASINGS)) for i, fact in enumerate(asked)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    right = sum(o.outputs[0].text == fact.name for o, fact in zip(outputs, asked, strict=True))
    assert right >= 190
