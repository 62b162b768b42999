"""The command line: generated flags, environment, one-line errors, exit statuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from running import Server

from memlane.config import EngineConfig, ServerConfig, options
from memlane_server import cli


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "memlane_server.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=60,
        check=False,
    )


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["serve", "--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for config in (EngineConfig, ServerConfig):
        for option in options(config):
            assert option.required or option.flag in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--prot", "1"], "unknown argument --prot; did you mean --port?"),
        (["serve", "--por", "1"], "unknown argument --por; did you mean --port?"),
        (["serve", "a", "b"], "unknown argument b"),
        (["serve", "--port"], "expected one argument"),
        (["serve", "--port", "x"], "--port: Expected `int`"),
        (["serve", "--port", "70000"], "--port: Expected `int` <= 65535"),
        (["serve", "--placement", "moon"], "--placement: Invalid enum value 'moon'"),
        (["serve", "--max-num-seqs", "0"], "--max-num-seqs: Expected `int` >= 1"),
        (["serve", "--api-key", " "], "--api-key: is empty"),
        (["convert", "a"], "required: DST"),
        (["check"], "required: MODEL"),
        (["check", "a", "--agains", "b"], "unknown argument --agains; did you mean --against?"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "required: COMMAND"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        status = cli.main(arguments)
    except SystemExit as left:
        status = left.code  # type: ignore[assignment]
    assert status == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEMLANE_PORT", "high")
    assert cli.main(["serve"]) == 2
    assert "MEMLANE_PORT: Expected `int`" in capsys.readouterr().err


def test_a_flag_wins_over_the_environment(toy: Path) -> None:
    with Server(
        toy, "--max-num-seqs", "3", "--no-prefix-caching", env={"MEMLANE_MAX_NUM_SEQS": "9"}
    ) as server:
        assert "max_num_seqs=3" in server.log
        assert "prefix_caching=False" in server.log


def test_served_name(toy: Path) -> None:
    with Server(toy, env={"MEMLANE_SERVED_MODEL_NAME": "my/model"}) as server:
        server.ready()
        assert server.client.get("/v1/models/my/model").json()["id"] == "my/model"
        assert server.client.post("/v1/completions", json={"model": "toy", "prompt": "x"}).status_code == 404


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, "memlane 0.1.0\n")


def test_converting_nothing_names_it(tmp_path: Path) -> None:
    done = run("convert", str(tmp_path / "missing"), str(tmp_path / "out"))
    assert done.returncode == 1
    assert "missing" in done.stderr
    assert "Traceback" not in done.stderr


def test_serving_nothing_names_it(tmp_path: Path) -> None:
    done = run("serve", str(tmp_path / "missing"), "--port", "0")
    assert done.returncode == 1
    assert "missing" in done.stderr


@pytest.mark.parametrize("module", ["memlane_server.app", "memlane_server.cli", "memlane_server.serve"])
def test_the_server_never_imports_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
