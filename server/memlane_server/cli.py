"""The `memlane` command. Options are generated from the config structs; this file names none of them."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any, NoReturn, TypeVar

import msgspec

from memlane import __version__
from memlane.config import EngineConfig, Option, ServerConfig, build, options
from memlane.errors import ConfigError, MemlaneError

ConfigT = TypeVar("ConfigT", bound=msgspec.Struct)

DEMO = "demo"  # beside the engine's modules, in the installed package


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and which flag may have been meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def refuse(self, arguments: list[str]) -> NoReturn:
        flag = arguments[0].split("=")[0]
        close = difflib.get_close_matches(flag, list(self._option_string_actions), n=1)
        self.error(f"unknown argument {flag}" + (f"; did you mean {close[0]}?" if close else ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    given, unknown = parser().parse_known_args(arguments)
    if unknown:
        given.parser.refuse(unknown)
    try:
        status: int = given.run(given)
        return status
    except ConfigError as error:
        print(f"memlane {given.command}: {error}", file=sys.stderr)
        return 2
    except MemlaneError as error:
        print(f"memlane {given.command}: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="memlane", description="Serve language models whose knowledge sits in lookup tables.")
    top.add_argument("--version", action="version", version=f"memlane {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_serve(commands)
    _add_convert(commands)
    _add_check(commands)
    _add_cache_sim(commands)
    _add_plan(commands)
    return top


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model over an OpenAI-compatible HTTP API",
        description="Serve a model over an OpenAI-compatible HTTP API. Every flag can also be set in the "
        "environment: --max-num-seqs as MEMLANE_MAX_NUM_SEQS. A flag wins over the environment.",
        allow_abbrev=False,
    )
    serve.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="model directory or checkpoint [the demo model, its table on disk]",
    )
    for title, config in (("engine", EngineConfig), ("server", ServerConfig)):
        group = serve.add_argument_group(title)
        for option in options(config):
            if not option.required:
                _add_option(group, option)
    serve.set_defaults(run=_serve, parser=serve)


def _add_option(group: Any, option: Option) -> None:
    text = option.help.replace("%", "%%")
    if option.default is not None and option.type is not bool:
        text += f" [{str(option.default).replace('%', '%%')}]"
    if option.type is bool:
        text += " [on]" if option.default else " [off]"
        group.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=text, default=None)
        return
    metavar = "|".join(option.choices) if option.choices else option.type.__name__.upper()
    # Values stay text here: types and limits are the structs', checked in one place.
    group.add_argument(option.flag, metavar=metavar, help=text)


def _serve(given: argparse.Namespace) -> int:
    from memlane_server.serve import run  # the other commands need no HTTP

    if given.model is None and not os.environ.get("MEMLANE_MODEL"):
        given.model = demo_directory()
        if given.placement is None and not os.environ.get("MEMLANE_PLACEMENT"):
            given.placement = "disk"  # it would fit RAM, but reading rows from disk is what there is to see
    return run(_config(EngineConfig, given), _config(ServerConfig, given))


def _config(config: type[ConfigT], given: argparse.Namespace) -> ConfigT:
    return build(config, {option.name: getattr(given, option.name) for option in options(config)})


def demo_directory() -> str:
    """Where the shipped model lies."""
    return str(resources.files("memlane") / DEMO)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="write a checkpoint of another form as a model directory",
        description="Write a checkpoint of another form (lingua, sparse-memory-lm) as a model directory.",
        allow_abbrev=False,
    )
    convert.add_argument("source", metavar="SRC", help="checkpoint file or directory")
    convert.add_argument("destination", metavar="DST", help="model directory to write")
    convert.add_argument(
        "--rows", metavar="FORMAT", help="store table rows so: int8, int4, fp8, … [as they are]"
    )
    convert.add_argument("--tokenizer", metavar="PATH", help="tokeniser, when the checkpoint brings none")
    convert.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    convert.set_defaults(run=_convert, parser=convert)


def _convert(given: argparse.Namespace) -> int:
    from memlane_server.convert import convert  # needs torch

    return convert(given.source, given.destination, given.rows, given.tokenizer, given.overwrite)


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="verify the checksums of a model directory",
        description="Read a whole model directory once and verify it: the checksum of every block of its tables, the "
        "scales of quantised rows, the SHA-256 of the other files. Exit status 0: no damage, 1: damaged.",
        allow_abbrev=False,
    )
    check.add_argument("model", metavar="MODEL", help="model directory")
    check.add_argument("--against", metavar="SRC", help="also measure how far its rows are from those of SRC")
    check.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    check.set_defaults(run=_check, parser=check)


def _check(given: argparse.Namespace) -> int:
    from memlane_server.check import check  # needs torch

    return check(given.model, given.against, given.json)


def _add_cache_sim(commands: Any) -> None:
    sim = commands.add_parser(
        "cache-sim",
        help="replay recorded rows over cache sizes and policies",
        description="Replay what `memlane serve --record-rows FILE` recorded over cache sizes and policies.",
        allow_abbrev=False,
    )
    sim.add_argument("file", metavar="FILE", help="what was recorded")
    sim.add_argument("--table", metavar="NAME", help="one table only [all]")
    sim.add_argument(
        "--sizes", metavar="LIST", help="sizes a table: 64MiB or 5%%, with commas between [nine]"
    )
    sim.add_argument("--policies", metavar="LIST", help="policies, with commas between [all there are]")
    sim.add_argument(
        "--budget", metavar="SIZE", help="RAM as --row-cache takes it [what was served with, else 25%%]"
    )
    sim.add_argument(
        "--warm-up", metavar="PART", default="20%", help="beginning that is not counted [%(default)s]"
    )
    sim.add_argument("--plot", metavar="PNG", help="draw the curves (needs matplotlib)")
    sim.add_argument("--json", metavar="FILE", help="write the numbers")
    sim.set_defaults(run=_cache_sim, parser=sim)


def _cache_sim(given: argparse.Namespace) -> int:
    from memlane_server.cache_sim import SIZES, cache_sim  # needs numpy and the native core

    sizes = given.sizes or SIZES
    return cache_sim(
        given.file, given.table, sizes, given.policies, given.budget, given.warm_up, given.plot, given.json
    )


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="what a model needs on this machine, and how to serve it",
        description="What a model needs in RAM and on disk on this machine, and the command to serve it with.",
        allow_abbrev=False,
    )
    plan.add_argument("model", metavar="MODEL", help="model directory or checkpoint; nothing is loaded")
    plan.add_argument("--memory", metavar="SIZE", help="RAM to plan with [what is available here]")
    plan.add_argument(
        "--trace", metavar="FILE", help="rows recorded with --record-rows, to size the cache by"
    )
    plan.add_argument("--json", action="store_true", help="print the numbers as JSON")
    plan.set_defaults(run=_plan, parser=plan)


def _plan(given: argparse.Namespace) -> int:
    from memlane_server.plan import plan  # needs torch

    return plan(given.model, given.memory, given.trace, given.json)


if __name__ == "__main__":
    sys.exit(main())
