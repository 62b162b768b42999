"""A FUSE file system that shows one folder's files, read-only, and fails their reads as it is told to.

python fuse_server.py FOLDER MOUNT_POINT [refuse-direct]

It speaks the kernel's protocol on /dev/fuse itself, so that nothing need be installed; it needs to be allowed to mount.
Files are opened with FOPEN_DIRECT_IO: each read of the reader's is one request here, as on a network file system that
keeps no page cache. refuse-direct: opening with O_DIRECT fails, as network file systems may have it.

Commands are JSON lines on stdin, each answered by one on stdout:

    {"rules": [{"begin": 0, "end": 4096, "do": "hang", "times": -1}, ...]}   reads of these bytes meet the first that fits
    {"release": true}       reads that hang go on, as if nothing had been
    {}                      only asks
                            -> {"reads": so many so far, "held": that hang now, "most": held at once so far}

do: "hang" | "eio" | "short" (value: bytes that a read gives at most) | "wait" (value: seconds).

At the end of stdin it unmounts and ends; the kernel fails what still hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import struct
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT = 1, 2, 3, 14, 15, 17, 18, 25, 26
INTERRUPT, BATCH_FORGET = 36, 42
NO_REPLY = (FORGET, BATCH_FORGET, INTERRUPT)
FOPEN_DIRECT_IO = 1
ASYNC_READ, ASYNC_DIO, MAX_PAGES = 1 << 0, 1 << 15, 1 << 22  # of FUSE_INIT
MS_RDONLY, MNT_DETACH = 1, 2
LARGEST_READ = 1 << 20
HEADER = struct.Struct("<IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, padding


class Held(NamedTuple):
    unique: int
    content: bytes
    until: float


class FileSystem:
    def __init__(self, folder: Path, refuse_direct: bool) -> None:
        self.folder, self.refuse_direct = folder, refuse_direct
        self.device = os.open("/dev/fuse", os.O_RDWR)
        self.names: list[str] = []  # of nodes 2, 3, ...
        self.files: dict[int, int] = {}  # descriptors by node
        self.rules: list[dict[str, Any]] = []
        self.held: list[Held] = []
        self.reads = self.most = 0

    def serve(self) -> None:
        commands = b""
        while True:
            now = time.monotonic()
            due = [held for held in self.held if held.until <= now]
            self.held = [held for held in self.held if held.until > now]
            for held in due:
                self.reply(held.unique, held.content)
            patience = min([held.until for held in self.held], default=now + 60) - now
            ready, _, _ = select.select([self.device, 0], [], [], min(max(patience, 0.0), 60.0))
            if 0 in ready:
                commands += (more := os.read(0, 1 << 16))
                if not more:
                    return
                *lines, commands = commands.split(b"\n")
                for line in lines:
                    self.command(json.loads(line))
            if self.device in ready:
                self.answer(os.read(self.device, LARGEST_READ + 4096))

    def command(self, told: dict[str, Any]) -> None:
        self.rules = told.get("rules", self.rules)
        if told.get("release"):
            self.held = [held._replace(until=0.0) for held in self.held]
        print(json.dumps({"reads": self.reads, "held": len(self.held), "most": self.most}), flush=True)

    def reply(self, unique: int, content: bytes = b"", error: int = 0) -> None:
        with contextlib.suppress(FileNotFoundError):  # whoever asked was killed meanwhile
            os.write(self.device, struct.pack("<IiQ", 16 + len(content), -error, unique) + content)

    def answer(self, message: bytes) -> None:
        _, opcode, unique, node, *_ = HEADER.unpack_from(message)
        body = message[HEADER.size :]
        if opcode == INIT:
            major, minor, ahead, flags = struct.unpack_from("<IIII", body)
            flags &= ASYNC_READ | ASYNC_DIO | MAX_PAGES
            content = struct.pack("<IIIIHHIIHHI28x", 7, min(minor, 31), ahead, flags, 1024, 1024, 1 << 16, 1,
                                  LARGEST_READ // 4096, 0, 0)  # fmt: skip
            self.reply(unique, content, 0 if major == 7 else errno.EPROTO)
        elif opcode == LOOKUP:
            self.lookup(unique, body.rstrip(b"\0").decode())
        elif opcode == GETATTR:
            self.reply(unique, struct.pack("<QII", 0, 0, 0) + self.attributes(node))
        elif opcode == OPEN:
            self.open(unique, node, struct.unpack_from("<I", body)[0])
        elif opcode == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            self.read(unique, node, offset, size)
        elif opcode == STATFS:
            self.reply(unique, struct.pack("<QQQQQIII28x", 0, 0, 0, 0, 0, 4096, 255, 4096))
        elif opcode == RELEASE:
            self.reply(unique)
        elif opcode not in NO_REPLY:
            self.reply(unique, error=errno.ENOSYS)

    def path(self, node: int) -> Path:
        return self.folder if node == 1 else self.folder / self.names[node - 2]

    def lookup(self, unique: int, name: str) -> None:
        if not (self.folder / name).exists():
            self.reply(unique, error=errno.ENOENT)
            return
        if name not in self.names:
            self.names.append(name)
        node = self.names.index(name) + 2
        self.reply(unique, struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self.attributes(node))

    def attributes(self, node: int) -> bytes:
        s = self.path(node).stat()
        nanoseconds = (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)
        return struct.pack(
            "<6Q10I", node, s.st_size, s.st_blocks, *(t // 10**9 for t in nanoseconds),
            *(t % 10**9 for t in nanoseconds), s.st_mode, 1, s.st_uid, s.st_gid, 0, 4096, 0,
        )  # fmt: skip

    def open(self, unique: int, node: int, flags: int) -> None:
        if self.refuse_direct and flags & os.O_DIRECT:
            self.reply(unique, error=errno.EINVAL)
            return
        if node not in self.files:
            self.files[node] = os.open(self.path(node), os.O_RDONLY)
        self.reply(unique, struct.pack("<QIi", 0, FOPEN_DIRECT_IO, 0))

    def read(self, unique: int, node: int, offset: int, size: int) -> None:
        self.reads += 1
        rule = self.rule_for(offset, offset + size)
        if rule["do"] == "eio":
            self.reply(unique, error=errno.EIO)
            return
        if rule["do"] == "short":
            size = min(size, rule["value"])
        content = os.pread(self.files[node], size, offset)
        if rule["do"] in ("hang", "wait"):
            seconds = rule["value"] if rule["do"] == "wait" else 1e9
            self.held.append(Held(unique, content, time.monotonic() + seconds))
            self.most = max(self.most, len(self.held))
            return
        self.reply(unique, content)

    def rule_for(self, begin: int, end: int) -> dict[str, Any]:
        for rule in self.rules:
            times = rule.setdefault("times", -1)
            if times and begin < rule["end"] and end > rule["begin"]:
                rule["times"] = times - 1
                return rule
        return {"do": ""}


def main(folder: str, mount_point: str, *options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    system = FileSystem(Path(folder), "refuse-direct" in options)
    how = f"fd={system.device},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={LARGEST_READ}"
    target = os.fsencode(mount_point)
    if libc.mount(b"memlane-faults", target, b"fuse", MS_RDONLY, how.encode()) != 0:
        sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
    try:
        print(json.dumps({}), flush=True)  # mounted
        system.serve()
    finally:
        libc.umount2(target, MNT_DETACH)
        os.close(system.device)  # the kernel fails what it still waits for


if __name__ == "__main__":
    main(*sys.argv[1:])
