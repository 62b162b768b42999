"""Starting, losing the engine, losing clients, and stopping. Every accepted request ends exactly once."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import Server

LONG = {"prompt": "slow:" + "x" * 200, "max_tokens": 200}  # about 6 s


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == code
    return error


def data(lines: Iterator[str]) -> Iterator[Any]:
    for line in lines:
        if line:
            text = line.removeprefix("data: ")
            yield text if text == "[DONE]" else json.loads(text)


def test_bound_early_ready_late(toy: Path) -> None:
    (toy / "delay").write_text("1.0")
    with Server(toy, "--log-level", "debug") as server:
        assert server.client.get("/health").status_code == 200
        response = server.client.get("/ready")
        assert "starting" in error_of(response, 503, "not_ready")["message"]
        assert response.headers["retry-after"] == "2"
        for path, body in (("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
            error_of(server.client.post(path, json=body), 503, "not_ready")
        error_of(server.client.get("/v1/models"), 503, "not_ready")
        assert server.client.get("/metrics").status_code == 200
        server.ready()
        assert server.client.post("/v1/completions", json={"prompt": "say:x"}).status_code == 200
        log = server.log
    assert "chosen: placement: host" in log
    assert "engine resident memory 1 MiB" in log
    assert f"serving at {server.url}/v1" in log
    assert "max_num_seqs=64" in log


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("fatal", "/m/model.safetensors: truncated", "/m/model.safetensors: truncated"),
        ("crash", "", "exit status 7"),
        ("generation_config.json", "{", "generation_config.json: not valid JSON"),
        ("tokenizer.json", "{", "tokenizer.json: not a usable tokenizer.json"),
        ("chat_template.jinja", "{% if %}", "chat template does not compile"),
    ],
)
def test_an_engine_that_cannot_start_ends_the_server(toy: Path, file: str, content: str, says: str) -> None:
    (toy / file).write_text(content)
    with Server(toy) as server:
        assert server.process.wait(timeout=20) == 1
        assert says in server.log
        assert "Traceback" not in server.log
        assert server.log.count("loading") == 1


def test_a_taken_port_is_one_clear_line(toy: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(
            AssertionError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"
        ):
            Server(toy, "--port", port)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["hang", "slow:" + "x" * 300])
def test_a_client_that_leaves_cancels_its_request(shared: Server, stream: bool, prompt: str) -> None:
    before = [line for line in shared.received if line.startswith("abort")]
    aborted = shared.metric("memlane:request_success_total", finished_reason="abort")
    body = json.dumps({"prompt": prompt, "stream": stream, "max_tokens": 150, "n": 2}).encode()
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.3)
    shared.until(lambda: len([x for x in shared.received if x.startswith("abort")]) == len(before) + 2)
    shared.until(
        lambda: shared.metric("memlane:request_success_total", finished_reason="abort") == aborted + 2
    )
    shared.until(lambda: shared.metric("memlane:num_requests_running") == 0)


def test_a_stop_string_cancels_the_rest(shared: Server) -> None:
    before = len([x for x in shared.received if x.startswith("abort")])
    body = {"prompt": "slow:ab" + "x" * 100, "stop": "b", "max_tokens": 100}
    answer = shared.client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == "a"
    shared.until(lambda: len([x for x in shared.received if x.startswith("abort")]) == before + 1)


def test_unreadable_rows_fail_only_their_request(shared: Server) -> None:
    results: list[httpx.Response] = []
    other = threading.Thread(
        target=lambda: results.append(
            httpx.post(shared.url + "/v1/completions", json={"prompt": "slow:abcdefgh"}, timeout=30)
        )
    )
    other.start()
    for stream in (True, False):
        response = shared.client.post("/v1/completions", json={"prompt": "rows", "stream": stream})
        assert "row 7" in error_of(response, 500, "rows_unreadable")["message"]
    with shared.client.stream("POST", "/v1/completions", json={"prompt": "rows-later", "stream": True}) as r:
        assert r.status_code == 200
        got = list(data(r.iter_lines()))
    assert [g["choices"][0]["text"] for g in got[:3]] == ["a", "b", "c"]
    assert got[3]["error"]["code"] == "rows_unreadable"
    assert got[4:] == ["[DONE]"]
    other.join()
    assert results[0].json()["choices"][0]["text"] == "abcdefgh"


def test_overload_is_refused_early(toy: Path) -> None:
    with Server(toy, "--max-queued-requests", "2") as server:
        server.ready()
        with server.client.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 2}) as running:
            lines = running.iter_lines()
            next(lines)
            response = server.client.post("/v1/completions", json={"prompt": "x"})
            assert "2 of at most 2" in error_of(response, 429, "overloaded")["message"]
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == "rate_limit_error"
        server.until(
            lambda: server.client.post("/v1/completions", json={"prompt": "say:x"}).status_code == 200
        )
        assert server.metric("memlane:admission_rejections_total", reason="overloaded") >= 1


def test_an_engine_killed_under_load_comes_back(toy: Path) -> None:
    with Server(toy) as server:
        server.ready()
        first = server.engine_pid()
        whole: list[httpx.Response] = []
        waiting = threading.Thread(
            target=lambda: whole.append(httpx.post(server.url + "/v1/completions", json=LONG, timeout=30))
        )
        waiting.start()
        with server.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as running:
            lines = data(running.iter_lines())
            next(lines)
            server.until(lambda: len([x for x in server.received if x.startswith("add")]) == 2)
            generated = server.metric("memlane:generation_tokens_total")
            os.kill(first, signal.SIGKILL)
            rest = list(lines)
        assert rest[-1] == "[DONE]"
        assert rest[-2]["error"]["code"] == "engine_died"
        assert "SIGKILL" in rest[-2]["error"]["message"]
        waiting.join()
        error_of(whole[0], 503, "engine_died")
        assert server.client.get("/health").status_code == 200
        refused = server.client.get("/ready")
        assert "restarting" in error_of(refused, 503, "not_ready")["message"]
        assert server.metric("memlane:engine_up") == 0
        server.ready()
        assert server.engine_pid() != first
        assert server.client.post("/v1/completions", json={"prompt": "say:x"}).status_code == 200
        assert server.metric("memlane:engine_up") == 1
        assert server.metric("memlane:generation_tokens_total") >= generated, "counters never shrink"
        assert not list(Path("/tmp").glob(f"memlane-*/{first}"))


def test_a_new_engine_leaves_the_record_of_the_dead_one_alone(toy: Path, tmp_path: Path) -> None:
    """It would be refused for the file that exists, and the server could not come back."""
    with Server(toy, "--record-rows", str(tmp_path / "rows")) as server:
        server.ready()
        assert server.received.count(f"records rows in {tmp_path / 'rows'}") == 1
        os.kill(server.engine_pid(), signal.SIGKILL)
        server.until(lambda: "rows are not recorded any more" in server.log)
        server.ready()
        assert server.received.count(f"records rows in {tmp_path / 'rows'}") == 1


def test_an_engine_that_ends_by_itself_mid_stream(toy: Path) -> None:
    with Server(toy) as server:
        server.ready()
        with server.client.stream("POST", "/v1/completions", json={"prompt": "die", "stream": True}) as r:
            got = list(data(r.iter_lines()))
        assert got[0]["choices"][0]["text"] == "ab"
        assert "exit status 3" in got[1]["error"]["message"]
        server.ready()


def test_a_silent_engine_is_replaced(toy: Path) -> None:
    with Server(toy, "--engine-timeout", "1") as server:
        server.ready()
        response = server.client.post("/v1/completions", json={"prompt": "silent"})
        assert "no sign of life for 1 s" in error_of(response, 503, "engine_died")["message"]
        server.ready()


def test_an_engine_that_cannot_come_back_ends_the_server(toy: Path) -> None:
    with Server(toy) as server:
        server.ready()
        (toy / "fatal").write_text("the disk is gone")
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.process.wait(timeout=30) == 1
        assert server.log.count("the disk is gone") >= 5


def test_sigterm_lets_running_requests_finish(toy: Path) -> None:
    with Server(toy) as server:
        server.ready()
        body = {"prompt": "slow:" + "x" * 30, "max_tokens": 40, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as running:
            lines = data(running.iter_lines())
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            refused = httpx.post(server.url + "/v1/completions", json={"prompt": "x"})
            assert "draining" in error_of(refused, 503, "not_ready")["message"]
            assert refused.headers["retry-after"] == "2"
            error_of(httpx.get(server.url + "/ready"), 503, "not_ready")
            assert httpx.get(server.url + "/health").status_code == 200
            rest = list(lines)
        assert rest[-2]["choices"][0]["finish_reason"] == "stop"
        assert rest[-1] == "[DONE]"
        assert server.process.wait(timeout=10) == 0
        assert "drain" in server.received


def test_sigterm_ends_what_takes_too_long(toy: Path) -> None:
    with Server(toy, "--shutdown-timeout", "0.3") as server:
        server.ready()
        with server.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as running:
            lines = data(running.iter_lines())
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert "shutting down" in rest[-2]["error"]["message"]
        assert rest[-1] == "[DONE]"
        assert server.process.wait(timeout=10) == 0


def test_a_second_signal_stops_at_once(toy: Path) -> None:
    with Server(toy) as server:
        server.ready()
        engine = server.engine_pid()
        with server.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            begun = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(timeout=10) == 1
            assert time.monotonic() - begun < 3
        assert not Path(f"/proc/{engine}").exists()


def test_stopping_while_starting_or_restarting(toy: Path) -> None:
    (toy / "delay").write_text("20")
    with Server(toy) as server:
        begun = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - begun < 5


def test_no_engine_outlives_a_killed_server(toy: Path) -> None:
    with Server(toy) as server:
        server.ready()
        engine = server.engine_pid()
        server.process.kill()
        server.process.wait()
        for _ in range(100):
            if not Path(f"/proc/{engine}").exists():
                break
            time.sleep(0.05)
        else:
            pytest.fail("the engine is still there")


def test_api_key(toy: Path) -> None:
    with Server(toy, env={"MEMLANE_API_KEY": "sécret"}) as server:
        server.until(lambda: httpx.get(server.url + "/ready").status_code == 200, 20)
        assert httpx.get(server.url + "/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nowhere"):
            response = httpx.get(server.url + path)
            error = error_of(response, 401, "invalid_api_key")
            assert set(error) == {"message", "type", "param", "code"}
            assert response.headers["www-authenticate"] == "Bearer"
        for value in (b"Bearer wrong", b"Bearer", b"Basic s\xc3\xa9cret", b"s\xc3\xa9cret", b"\xff\xfe", b""):
            response = httpx.get(server.url + "/v1/models", headers={b"authorization": value})
            error_of(response, 401, "invalid_api_key")
        good = {b"authorization": "Bearer sécret".encode()}
        assert httpx.get(server.url + "/v1/models", headers=good).status_code == 200
        assert server.terminate() == 0
        assert "cret" not in server.log.replace("secret", "")


def test_logs_hold_no_prompts(toy: Path) -> None:
    with Server(toy, "--log-level", "debug") as server:
        server.ready()
        for body in (
            {"prompt": "say:my-secret"},
            {"prompt": "my-secret", "x": 1},
            {"prompt": ["my-secret", 1]},
        ):
            server.client.post("/v1/completions", json=body)
        assert server.terminate() == 0
        assert "my-secret" not in server.log
