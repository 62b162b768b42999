"""Where files lie, from a /proc and a /sys made for the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from memlane.storage import locate


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """/sys with a rotating sda that has a partition, and an nvme0n1."""
    root = tmp_path / "sys"
    for name, rotational in (("sda", "1"), ("nvme0n1", "0")):
        (root / "devices" / name / "queue").mkdir(parents=True)
        (root / "devices" / name / "queue" / "rotational").write_text(rotational + "\n")
    (root / "devices" / "sda" / "sda1").mkdir()
    (root / "devices" / "sda" / "sda1" / "partition").write_text("1\n")
    for folder in ("dev/block", "class/block"):
        (root / folder).mkdir(parents=True)
    (root / "dev/block/8:1").symlink_to("../../devices/sda/sda1")
    (root / "dev/block/259:0").symlink_to("../../devices/nvme0n1")
    (root / "class/block/nvme0n1").symlink_to("../../devices/nvme0n1")
    return root


def mounts(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "mountinfo"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_the_deepest_mount_and_the_whole_device(tmp_path: Path, system: Path) -> None:
    place = tmp_path / "my models"
    place.mkdir()
    escaped = str(place).replace(" ", "\\040")
    table = mounts(
        tmp_path,
        "20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw",
        f"21 20 259:0 / {escaped} rw shared:2 master:1 - xfs /dev/nvme0n1 rw",
        f"22 20 8:1 / {escaped}x rw - ext4 /dev/sda1 rw",
    )
    found = locate(place / "not" / "made" / "yet", table, system)
    assert found is not None
    assert (found.mount_point, found.file_system, found.device) == (str(place), "xfs", "nvme0n1")
    assert found.rotational is False
    assert found.free > 0
    root = locate(tmp_path, table, system)
    assert root is not None
    assert (root.mount_point, root.device, root.rotational) == ("/", "sda", True)


@pytest.mark.parametrize(
    ("line", "device", "says"),
    [
        ("20 1 0:30 /sub / rw - btrfs /dev/nvme0n1 rw", "nvme0n1", "not rotational"),
        ("20 1 0:50 / / rw - overlay overlay rw,lowerdir=/a", None, "names no block device"),
        ("20 1 0:60 / / rw - nfs4 server:/models rw", None, "server:/models"),
        ("20 1 0:70 / / rw - tmpfs tmpfs rw", None, "in RAM"),
    ],
)
def test_file_systems_without_a_number_of_a_device(
    tmp_path: Path, system: Path, line: str, device: str | None, says: str
) -> None:
    found = locate(tmp_path, mounts(tmp_path, line), system)
    assert found is not None
    assert found.device == device
    assert says in str(found)


def test_a_later_mount_hides_an_earlier_one(tmp_path: Path, system: Path) -> None:
    table = mounts(tmp_path, "20 1 8:1 / / rw - ext4 /dev/sda1 rw", "21 1 0:9 / / rw - tmpfs none rw")
    found = locate(tmp_path, table, system)
    assert found is not None
    assert found.in_memory


def test_elsewhere_nothing_is_known(tmp_path: Path) -> None:
    assert locate(tmp_path, tmp_path / "missing", tmp_path) is None


def test_here() -> None:
    found = locate(Path(__file__))
    assert found is not None
    assert Path(found.mount_point).is_absolute()
