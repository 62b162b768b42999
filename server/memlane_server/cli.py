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
    from memlane_server.convert import convert  # the one command that needs torch

    return convert(given.source, given.destination, given.rows, given.tokenizer, given.overwrite)


if __name__ == "__main__":
    sys.exit(main())
