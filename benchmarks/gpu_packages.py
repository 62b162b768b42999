"""Which Python packages a GPU machine lacks, and which wheels in a folder bring them. Nothing is asked of any network.

Run by itself it prints what `deploy/gpu/wheels.sh` is to download.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename
    from packaging.version import Version
except ImportError:  # pip brings its own copy
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
    from pip._vendor.packaging.utils import (  # type: ignore[assignment]
        canonicalize_name,
        parse_wheel_filename,
    )
    from pip._vendor.packaging.version import Version  # type: ignore[assignment]

__all__ = ["Needs", "Wheel", "needs", "requirements"]

# Of the packages for development, those that tests on a GPU need.
_FOR_TESTS = {"hypothesis", "psutil", "pytest", "pytest-asyncio", "pytest-timeout", "triton"}

# A machine with torch for its GPU has these, or it is no use: large, and made for each other.
_NEVER_CARRIED = {"numpy", "safetensors", "tokenizers", "torch", "triton"}


class Wheel(NamedTuple):
    """A wheel in the folder."""

    path: Path
    version: Version


class Needs(NamedTuple):
    """wheels: to be installed. missing: requirements that neither the machine nor the folder meets."""

    wheels: list[Path]
    missing: list[str]


def requirements(root: Path) -> list[Requirement]:
    """What building, running and testing need, as pyproject.toml says."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    stated = [*project["build-system"]["requires"], *project["project"].get("dependencies", [])]
    wanted = [Requirement(text) for text in stated]
    for text in project.get("dependency-groups", {}).get("dev", []):
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) in _FOR_TESTS:
            wanted.append(requirement)
    return [requirement for requirement in wanted if _applies(requirement)]


def needs(root: Path, folder: Path) -> Needs:
    """What is to be installed from `folder` so that everything is there, packages that those need included.

    What the machine has and is new enough stays; it is taken to have what it needs itself.
    """
    wheels = _wheels_in(folder)
    chosen: dict[str, Path] = {}
    missing: list[str] = []
    wanted = requirements(root)
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name in chosen or _is_installed(requirement):
            continue
        fitting = [wheel for wheel in wheels.get(name, []) if _fits(requirement, wheel.version)]
        if not fitting:
            missing.append(str(requirement))
            continue
        best = max(fitting, key=lambda wheel: wheel.version)
        chosen[name] = best.path
        wanted += _needs_of(best.path)
    return Needs(sorted(chosen.values()), sorted(set(missing)))


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _fits(requirement: Requirement, version: Version) -> bool:
    return requirement.specifier.contains(version, prereleases=True)


def _is_installed(requirement: Requirement) -> bool:
    try:
        return _fits(requirement, Version(importlib.metadata.version(requirement.name)))
    except importlib.metadata.PackageNotFoundError:
        return False


def _wheels_in(folder: Path) -> dict[str, list[Wheel]]:
    found: dict[str, list[Wheel]] = {}
    for path in sorted(folder.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(path.name)
        found.setdefault(name, []).append(Wheel(path, version))
    return found


def _needs_of(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    stated = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    return [requirement for requirement in stated if _applies(requirement)]


if __name__ == "__main__":
    for line in requirements(Path(__file__).parents[1]):
        if canonicalize_name(line.name) not in _NEVER_CARRIED:
            sys.stdout.write(f"{line.name}{line.specifier}\n")
