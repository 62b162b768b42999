"""The documents say what the code does."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from memlane_server.protocol.chat import ChatRequest
from memlane_server.protocol.completions import CompletionRequest
from memlane_server.protocol.errors import HTTP_CODES, KINDS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("file", ["cli.md", "metrics.md"])
def test_generated_pages_are_up_to_date(file: str) -> None:
    page = runpy.run_path(str(DOCS / "generate.py"))["PAGES"][file]
    assert (DOCS / file).read_text() == page(), "run: python docs/generate.py"


def test_every_error_is_listed_with_its_status() -> None:
    text = (DOCS / "api.md").read_text()
    listed = {
        (int(cells[1]), cells[2].strip("`"))
        for cells in ([c.strip() for c in line.split("|")] for line in text.splitlines())
        if len(cells) > 3 and cells[1].isdigit()
    }
    expected = {(m.status, kind.value) for kind, m in KINDS.items()}
    expected |= {(status, code) for code, (status, _) in HTTP_CODES.items()}
    assert listed == expected


def test_every_field_is_mentioned() -> None:
    text = (DOCS / "api.md").read_text()
    for name in [*CompletionRequest.model_fields, *ChatRequest.model_fields]:
        assert f"`{name}`" in text, name
