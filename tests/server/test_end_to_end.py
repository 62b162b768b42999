"""The command line, the HTTP side and the real engine together, on the golden checkpoints."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running import REAL, Server
from safetensors.numpy import load_file

DATA = Path(__file__).parents[1] / "data" / "lingua" / "a_memplus"


def convert(destination: Path, *flags: str) -> Path:
    command = [*REAL, "convert", str(DATA), str(destination), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert f"wrote {destination}" in done.stdout
    return destination


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("real") / "golden")


@pytest.fixture(scope="module")
def real(model: Path) -> Iterator[Server]:
    """The table on disk, with room for few rows."""
    with Server(model, "--placement", "disk", "--row-cache", "5%", "--threads", "1", command=REAL) as server:
        yield server.ready(60)


def greedy(prompt: list[int], count: int, **more: Any) -> dict[str, Any]:
    body = {
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return body | more


@pytest.fixture(scope="module")
def golden() -> tuple[list[int], list[int]]:
    """A prompt, and what the reference implementation continues it with."""
    expected = load_file(DATA / "expected.safetensors")
    return expected["greedy_prompt"].tolist(), expected["greedy_tokens"].tolist()


def test_served_tokens_are_the_references(real: Server, golden: tuple[list[int], list[int]]) -> None:
    prompt, tokens = golden
    body = real.client.post("/v1/completions", json=greedy(prompt, len(tokens))).json()
    assert body["choices"][0]["token_ids"] == tokens
    assert body["choices"][0]["finish_reason"] == "length"
    # Statistics travel ten times a second, not with every answer.
    real.until(lambda: real.metric("memlane:table_bytes_read_total", table="values", tier="disk") > 0)
    assert "io_uring" in real.log or "threads" in real.log, "the way of reading is logged"


async def test_many_at_once_get_what_each_would_get_alone(
    real: Server, golden: tuple[list[int], list[int]]
) -> None:
    prompt, tokens = golden
    async with httpx.AsyncClient(base_url=real.url, timeout=60) as http:

        async def stream(i: int) -> list[int]:
            got: list[int] = []
            body = greedy(prompt[: len(prompt) - i % 3], len(tokens), stream=True)
            async with http.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        got += json.loads(line[6:])["choices"][0]["token_ids"]
            return got

        alone = [await stream(i) for i in range(3)]
        together = await asyncio.gather(*(stream(i) for i in range(12)))
    assert alone[0] == tokens
    assert together == [alone[i % 3] for i in range(12)]


def test_the_sdk(real: Server) -> None:
    with openai.OpenAI(base_url=real.url + "/v1", api_key="-") as client:
        once = client.completions.create(model="golden", prompt="hello", max_tokens=6, seed=5, n=2)
        again = client.completions.create(model="golden", prompt="hello", max_tokens=6, seed=5, n=2)
        assert [c.text for c in once.choices] == [c.text for c in again.choices]
        assert once.choices[0].text != once.choices[1].text
        pieces = list(
            client.completions.create(model="golden", prompt="hello", max_tokens=6, seed=5, stream=True)
        )
        assert "".join(p.choices[0].text for p in pieces) == once.choices[0].text
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="golden", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(openai.BadRequestError, match="64"):
            client.completions.create(model="golden", prompt="x" * 64)


def test_logprobs_are_of_the_tokens(real: Server, golden: tuple[list[int], list[int]]) -> None:
    prompt, _ = golden
    body = real.client.post("/v1/completions", json=greedy(prompt, 4, logprobs=3)).json()
    logprobs = body["choices"][0]["logprobs"]
    for chosen, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert chosen == max(top.values()) < 0
        assert len(top) == 3


def test_the_engine_killed_mid_stream(
    model: Path, tmp_path: Path, golden: tuple[list[int], list[int]]
) -> None:
    prompt, tokens = golden
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}")
    with Server(model, "--placement", "host", "--chat-template", str(template), command=REAL) as server:
        server.ready(60)
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "ignore_eos": True}
        answer = server.client.post("/v1/chat/completions", json=chat).json()
        assert answer["usage"]["completion_tokens"] == 4
        assert server.client.post("/tokenize", json={"messages": chat["messages"]}).json()["count"] == 5
        with server.client.stream(
            "POST", "/v1/completions", json=greedy(prompt, 50, stream=True)
        ) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.engine_pid(), signal.SIGKILL)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        if "engine_died" in rest[-2]:  # else it had finished before the signal came
            assert json.loads(rest[-2][6:])["error"]["code"] == "engine_died"
        server.until(lambda: server.client.get("/ready").status_code == 503, 5)
        server.ready(60)
        body = server.client.post("/v1/completions", json=greedy(prompt, len(tokens))).json()
        assert body["choices"][0]["token_ids"] == tokens
        engine = server.engine_pid()
        server.process.kill()
        for _ in range(100):
            if not Path(f"/proc/{engine}").exists():
                break
            time.sleep(0.05)
        assert not Path(f"/proc/{engine}").exists(), "no engine outlives its server"


def test_rows_that_cannot_be_read_fail_their_requests_only(tmp_path: Path, model: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    with Server(broken, "--placement", "disk", "--row-cache", "5%", command=REAL) as server:
        server.ready(60)
        table = broken / "table-values.safetensors"
        os.truncate(table, table.stat().st_size - 8192)  # a quarter of the rows
        answers = [
            server.client.post("/v1/completions", json=greedy([i, i + 1, i + 2, i + 3], 1))
            for i in range(5, 45)
        ]
        codes = {a.status_code for a in answers}
        assert codes <= {200, 500}
        assert 500 in codes
        for answer in answers:
            if answer.status_code == 500:
                assert answer.json()["error"]["code"] == "rows_unreadable"
        assert server.client.get("/ready").status_code == 200
        assert server.metric("memlane:table_io_errors_total", table="values") > 0
        assert server.terminate() == 0


@pytest.mark.parametrize("name", ["model.safetensors", "table-values.safetensors"])
def test_a_damaged_checkpoint_is_named_and_ends_the_server(tmp_path: Path, model: Path, name: str) -> None:
    damaged = Path(shutil.copytree(model, tmp_path / "damaged"))
    file = damaged / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    done = subprocess.run(
        [*REAL, "serve", str(damaged), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    line = next(x for x in done.stderr.splitlines() if "the engine cannot start" in x)
    assert name in line
    assert "Traceback" not in done.stderr


def test_the_command_is_installed() -> None:
    assert Path(sys.executable).with_name("memlane").exists()
