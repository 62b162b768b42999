"""A served table whose file is damaged: the requests that need it fail and say why, all others do not notice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import demo
import pytest
from demo import PAGE, TABLE, Asked, all_at_once
from running import REAL, Server

OPTIONS = ("--placement", "disk", "--warm-start", "off", "--threads", "1")


class Two(NamedTuple):
    """A request that needs a page, and others that need none from that page on."""

    needs: Asked
    page: int
    others: list[Asked]


@pytest.fixture(scope="module")
def two() -> Two:
    short = demo.ask([[token] for token in range(40, 70)], 1)
    last = {i: max(demo.pages(demo.DEMO, one.rows)) for i, one in enumerate(short)}
    others = sorted(last, key=lambda i: last[i])[:4]
    (needs,) = demo.ask([[300, 301, 302, 303, 304, 305]], 6)
    page = max(demo.pages(demo.DEMO, needs.rows))
    assert page > max(last[i] for i in others)
    return Two(needs, page, [short[i] for i in others])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return demo.copy_of_demo(tmp_path / "demo")


def flip_a_byte(model: Path, row: int) -> None:
    at = demo.layout(model).offset + row * demo.layout(model).stride + 7
    with (model / TABLE).open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def assert_it_alone_fails(server: Server, two: Two, *, says: str) -> str:
    """The request fails alone, and beside others, which succeed before, at the same time and after; its message."""
    message = ""
    for _ in range(2):
        assert all(one.is_answered_by(server) for one in two.others)
        failed, *answered = all_at_once(server, [two.needs, *two.others])
        assert failed.status_code == 500
        error = failed.json()["error"]
        message = error["message"]
        assert error["code"] == "rows_unreadable"
        assert "table 'values'" in message
        assert says in message
        assert "/" not in message, "clients are told no path"
        for one, response in zip(two.others, answered, strict=True):
            assert response.json()["choices"][0]["token_ids"] == one.answer
    assert server.client.get("/ready").status_code == 200
    return message


def test_a_flipped_byte(model: Path, two: Two) -> None:
    row = max(two.needs.rows)
    flip_a_byte(model, row)
    with Server(model, *OPTIONS, command=REAL) as server:
        server.ready(60)
        message = assert_it_alone_fails(server, two, says="do not match their checksum")
        assert str(row) in message
        server.until(lambda: server.metric("memlane:table_io_errors_total", table="values") >= 2)
        assert server.metric("memlane:table_corrupt_pages_total", table="values", tier="disk") >= 2
        assert server.metric("memlane:table_io_errors_total", table="values", tier="disk") >= 2
        flip_a_byte(model, row)
        assert two.needs.is_answered_by(server)
        errors = server.metric("memlane:table_io_errors_total", table="values")
        assert all(one.is_answered_by(server) for one in [two.needs, *two.others])
        assert server.metric("memlane:table_io_errors_total", table="values") == errors
        assert server.log.count("could not be read") >= 2
        assert "Traceback" not in server.log
        assert server.terminate() == 0


@pytest.fixture
def small(model: Path) -> Iterator[Server]:
    """A server whose cache holds next to nothing: every row is read each time it is needed."""
    with Server(model, *OPTIONS, "--row-cache", "1KiB", command=REAL) as server:
        yield server.ready(60)


def test_the_file_changes_while_it_is_served(model: Path, small: Server, two: Two) -> None:
    file, layout = model / TABLE, demo.layout(model)
    whole = file.read_bytes()
    assert two.needs.is_answered_by(small)

    # Overwritten in place.
    with file.open("r+b") as other:
        other.seek(layout.offset + two.page * PAGE)
        other.write(bytes(layout.offset + layout.nbytes - other.tell()))
    assert_it_alone_fails(small, two, says="do not match their checksum")
    file.write_bytes(whole)
    assert two.needs.is_answered_by(small)

    # Truncated.
    os.truncate(file, layout.offset + two.page * PAGE)
    assert_it_alone_fails(small, two, says="the file ends before it")
    file.write_bytes(whole)
    assert two.needs.is_answered_by(small)

    # Replaced: the file that was opened is the one that is served.
    another = model / "another"
    another.write_bytes(
        whole[: layout.offset] + bytes(layout.nbytes) + whole[layout.offset + layout.nbytes :]
    )
    another.replace(file)
    assert all(one.is_answered_by(small) for one in [two.needs, *two.others])

    # Gone altogether, which also the end must survive.
    file.unlink()
    assert all(one.is_answered_by(small) for one in [two.needs, *two.others])
    assert small.terminate() == 0
    assert "Traceback" not in small.log


def test_a_cache_smaller_than_a_batch(small: Server) -> None:
    asked = demo.ask([list(range(start, start + 40)) for start in range(100, 1300, 100)], 8)
    for response, one in zip(all_at_once(small, asked), asked, strict=True):
        assert response.json()["choices"][0]["token_ids"] == one.answer
    small.until(lambda: small.metric("memlane:table_scratch_rows_total", table="values") > 1000)
    slots = small.metric("memlane:table_cache_slots", table="values")
    assert small.metric("memlane:table_cache_used_slots", table="values") <= slots < 10


def test_two_servers_on_one_table(model: Path, two: Two) -> None:
    asked = [*demo.ask([list(range(start, start + 20)) for start in range(100, 900, 100)], 8), *two.others]
    flags = ("--placement", "disk", "--row-cache", "2%", "--threads", "1")
    with Server(model, *flags, command=REAL) as first, Server(model, *flags, command=REAL) as second:
        first.ready(60)
        second.ready(60)
        for _ in range(2):
            for server in (first, second):
                for response, one in zip(all_at_once(server, asked), asked, strict=True):
                    assert response.json()["choices"][0]["token_ids"] == one.answer
        assert [first.terminate(), second.terminate()] == [0, 0]
        assert "WARNING" not in first.log + second.log


def test_without_io_uring(model: Path, two: Two) -> None:
    """As in a sandbox that forbids it: threads read, with the same bits, and the log says why."""
    forbidding = [REAL[0], str(Path(__file__).with_name("without_uring.py"))]
    with Server(model, *OPTIONS, command=forbidding) as server:
        server.ready(60)
        assert all(one.is_answered_by(server) for one in [two.needs, *two.others])
        assert server.metric("memlane:table_info", table="values", tier="disk") == 1
        assert 'backend="threads+' in server.client.get("/metrics").text
        line = next(line for line in server.log.splitlines() if "rows are read by" in line)
        assert "threads+" in line
        assert "io_uring_setup: Operation not permitted" in line
        assert server.terminate() == 0
