"""The import rules of the architecture, held by reading the code (and once by running it)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "engine" / "memlane"
OURS = ("memlane", "memlane_server", "memlane_client")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


# folder, which of our own modules it may import, which outside modules it may not
RULES = [
    (ROOT / "clients" / "python" / "memlane_client", ("memlane_client",), ("torch",)),
    (
        ROOT / "server" / "memlane_server",
        (
            "memlane_server",
            "memlane.ipc",
            "memlane.request",
            "memlane.config",
            "memlane.errors",
            "memlane.text",
            "memlane.__version__",
        ),
        ("torch", "numpy"),
    ),
    (ENGINE / "tables", ("memlane.tables", "memlane.native", "memlane.kernels"), ()),
    (ENGINE / "kernels", ("memlane.kernels",), ()),
    (ENGINE / "native", ("memlane.native",), ()),
    (ENGINE / "text", ("memlane.text", "memlane.errors"), ("torch",)),
    (
        ENGINE / "scheduler",
        ("memlane.scheduler", "memlane.request", "memlane.errors", "memlane.config"),
        ("torch", "numpy"),
    ),
    (
        ENGINE / "models",
        (
            "memlane.models",
            "memlane.tables",
            "memlane.native",
            "memlane.kernels",
            "memlane.checkpoints",
            "memlane.errors",
        ),
        (),
    ),
]

# The command line reaches these lazily: `memlane serve` must not pay for torch.
EXCEPTIONS = {
    ("cli.py", "memlane.checkpoints"),
    ("convert.py", "memlane.checkpoints"),
    ("check.py", "memlane.checkpoints"),
    ("cache_sim.py", "memlane.tables"),
    ("cache_plot.py", "numpy"),
    ("plan.py", "memlane.planner"),
    ("plan.py", "memlane.storage"),
}


@pytest.mark.parametrize(
    ("folder", "ours", "never"), RULES, ids=lambda v: v.name if isinstance(v, Path) else ""
)
def test_each_part_imports_only_what_lies_below_it(
    folder: Path, ours: tuple[str, ...], never: tuple[str, ...]
) -> None:
    files = sorted(folder.rglob("*.py"))
    assert files, f"{folder} holds no code"
    for path in files:
        for module in imports(path):
            if any(path.name == name and within(module, allowed) for name, allowed in EXCEPTIONS):
                continue
            assert not within(module, *never), f"{path.relative_to(ROOT)} imports {module}"
            assert not within(module, *OURS) or within(module, *ours), (
                f"{path.relative_to(ROOT)} imports {module}"
            )


def test_models_reach_tables_only_through_the_public_classes() -> None:
    allowed = (
        "memlane.tables.ValueTable",
        "memlane.tables.Table",
        "memlane.tables.protocol",
        "memlane.tables.table",
    )
    allowed += ("memlane.tables.layout", "memlane.tables.reference", "memlane.tables.TableLayout")
    allowed += ("memlane.tables.ReferenceTable", "memlane.tables.errors")
    allowed += ("memlane.tables.ServedTable", "memlane.tables.gpu_open")
    allowed += ("memlane.tables.device", "memlane.tables.source")  # how tables are opened
    for path in (ENGINE / "models").rglob("*.py"):
        for module in imports(path):
            assert not within(module, "memlane.tables") or within(module, *allowed), f"{path}: {module}"


@pytest.mark.parametrize(
    "module", ["memlane", "memlane.config", "memlane.ipc", "memlane_server.app", "memlane_server.cli"]
)
def test_importing_does_not_bring_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
