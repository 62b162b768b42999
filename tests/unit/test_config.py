from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

import memlane
from memlane.config import EngineConfig, ServerConfig, build, options, parse_bytes
from memlane.errors import ConfigError


def test_explicit_values_win_over_the_environment_and_the_environment_over_defaults() -> None:
    environment = {"MEMLANE_SEED": "3", "MEMLANE_THREADS": "7", "MEMLANE_PREFIX_CACHING": "false"}
    config = build(EngineConfig, {"model": "m", "threads": 2, "dtype": None}, environment)
    assert (config.threads, config.seed, config.prefix_caching, config.dtype) == (2, 3, False, "auto")


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ({}, {"MEMLANE_PORT": "99999"}, "MEMLANE_PORT: .*65535"),
        ({}, {"MEMLANE_PORT": "web"}, "MEMLANE_PORT: Expected `int`"),
        ({"port": -1}, {}, "--port: "),
        ({"prot": 1}, {}, "unknown field `prot`"),
        ({"log_level": "loud"}, {}, "--log-level: Invalid enum value 'loud'"),
    ],
)
def test_bad_values_are_refused_with_the_name_of_where_they_came_from(
    given: dict[str, object], environment: dict[str, str], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        build(ServerConfig, given, environment)


@pytest.mark.parametrize(
    ("option", "value"), [("row_cache", "12parsecs"), ("row_cache", "-5"), ("kv_cache", "25%")]
)
def test_sizes_are_checked_before_anything_is_loaded(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}: '{value}' is not a size"):
        build(EngineConfig, {"model": "m", option: value}, {})


def test_a_required_option_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="model"):
        build(EngineConfig, {}, {})


@pytest.mark.parametrize("config", [EngineConfig, ServerConfig])
def test_every_option_has_help_and_a_default_of_its_own_type(config: type[msgspec.Struct]) -> None:
    for option in options(config):
        assert option.help
        if not option.required and option.default is not None:
            assert build(
                config,
                {"model": "m"} if config is EngineConfig else {},
                {option.environment: str(option.default)},
            )


def test_no_option_name_is_used_twice() -> None:
    names = [o.name for config in (EngineConfig, ServerConfig) for o in options(config)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("4096", 4096), ("64MiB", 64 * 2**20), ("1.5 GB", 1_500_000_000), ("2k", 2000), ("25%", 250)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text, whole=1000) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1", "12 parsecs", "101%", "1e9", "nan"])
def test_sizes_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match="--row-cache"):
        parse_bytes(text, whole=1000, option="--row-cache")


def test_a_percentage_needs_something_to_be_a_part_of() -> None:
    with pytest.raises(ConfigError):
        parse_bytes("25%")


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == memlane.__version__
