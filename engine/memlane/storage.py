"""What files lie on: the mount, its file system, and the block device below, as the Linux kernel states them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Storage", "locate"]


@dataclass(frozen=True)
class Storage:
    """Where a path lies. device, rotational: None where the kernel names no block device (overlay, network, memory).

    source: what is mounted, in the file system's own words. free: bytes that can be written.
    """

    mount_point: str
    file_system: str
    source: str
    device: str | None
    rotational: bool | None
    free: int

    @property
    def in_memory(self) -> bool:
        """Whether files here take RAM."""
        return self.file_system in ("tmpfs", "ramfs")

    def __str__(self) -> str:
        if self.in_memory:
            return f"{self.file_system} on {self.mount_point}: in RAM"
        # Not "a rotating disk": virtual disks call themselves rotational whatever they are.
        kind = {True: ", rotational by its own word", False: ", not rotational", None: ""}[self.rotational]
        device = f"device {self.device}{kind}" if self.device else "the kernel names no block device for it"
        return f"{self.file_system} on {self.mount_point} ({self.source}; {device})"


@dataclass(frozen=True)
class _Mount:
    number: str  # major:minor
    point: Path
    file_system: str
    source: str


def locate(
    path: str | Path, mounts: Path = Path("/proc/self/mountinfo"), system: Path = Path("/sys")
) -> Storage | None:
    """What a path lies on, or would if it were made; None where the system does not tell (not Linux)."""
    place = Path(path).resolve()
    while not place.exists():
        place = place.parent
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    above = [m for m in map(_parse, lines) if m is not None and place.is_relative_to(m.point)]
    if not above:
        return None
    longest = max(len(m.point.parts) for m in above)
    mount = [m for m in above if len(m.point.parts) == longest][-1]  # the last one hides those before it
    device = _device(mount, system)
    return Storage(
        str(mount.point),
        mount.file_system,
        mount.source,
        None if device is None else device.name,
        None if device is None else _rotational(device),
        shutil.disk_usage(place).free,
    )


def _parse(line: str) -> _Mount | None:
    """36 35 98:0 /root /point rw,noatime shared:1 - ext4 /dev/sda1 rw   (proc(5): optional fields end with a dash)"""
    before, dash, after = line.partition(" - ")
    fields, rest = before.split(" "), after.split(" ")
    if not dash or len(fields) < 6 or len(rest) < 2:
        return None
    return _Mount(fields[2], Path(_unescape(fields[4])), rest[0], _unescape(rest[1]))


def _unescape(text: str) -> str:
    """Blanks and backslashes stand in octal: `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), text)


def _device(mount: _Mount, system: Path) -> Path | None:
    """The directory of the whole device under /sys; file systems with numbers of their own (btrfs) name a source."""
    candidates = [system / "dev" / "block" / mount.number]
    if mount.source.startswith("/dev/"):
        candidates.append(system / "class" / "block" / Path(mount.source).resolve().name)
    for candidate in candidates:
        if candidate.exists():
            found = candidate.resolve()
            return found.parent if (found / "partition").exists() else found
    return None


def _rotational(device: Path) -> bool | None:
    try:
        return (device / "queue" / "rotational").read_text().strip() == "1"
    except OSError:
        return None
