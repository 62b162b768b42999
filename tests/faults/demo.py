"""The demo model, what it answers, and which rows of its table an answer needs: computed here, to compare servers with."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from running import Server
from tiny import answer, greedy

import memlane
from memlane.config import EngineConfig
from memlane.engine import Engine
from memlane.tables import TableLayout

DEMO = Path(memlane.__file__).parent / "demo"
TABLE = "table-values.safetensors"
PAGE = 4096


class Asked(NamedTuple):
    """A request, its greedy answer, and the rows of the table that computing it reads."""

    prompt: list[int]
    answer: list[int]
    rows: set[int]

    def body(self, **more: Any) -> dict[str, Any]:
        body = {"prompt": self.prompt, "max_tokens": len(self.answer), "temperature": 0, "ignore_eos": True}
        return body | {"return_token_ids": True} | more

    def send(self, server: Server) -> httpx.Response:
        return server.client.post("/v1/completions", json=self.body())

    def is_answered_by(self, server: Server) -> bool:
        return self.send(server).json()["choices"][0]["token_ids"] == self.answer


def ask(prompts: list[list[int]], count: int) -> list[Asked]:
    """What the demo answers with its whole table in RAM."""
    engine = Engine(EngineConfig(model=str(DEMO), placement="host", threads=1, prefix_caching=False))
    asked = []
    for prompt in prompts:
        rows: set[int] = set()
        engine.model.tables["values"].recorder = lambda ids, rows=rows: rows.update(ids.tolist())
        asked.append(Asked(prompt, answer(engine, prompt, greedy(max_tokens=count)), rows))
    engine.close()
    return asked


def layout(model: Path) -> TableLayout:
    return TableLayout.from_safetensors(model / TABLE, "values", "int8", 128)


def pages(model: Path, rows: set[int]) -> set[int]:
    """Pages of the table that hold bytes of these rows."""
    stride = layout(model).stride
    return {at // PAGE for row in rows for at in (row * stride, (row + 1) * stride - 1)}


def copy_of_demo(place: Path) -> Path:
    return Path(shutil.copytree(DEMO, place))


def all_at_once(server: Server, asked: list[Asked]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda one: one.send(server), asked))
