"""Memory that the processes of one machine share: a file in /dev/shm, filled by the first, removed by the last.

    | content, nbytes | up to a page | mark |      the mark comes last: without it the content is not whole

    exclusive lock granted    nobody has it: whole -> use it; else fill it, then the mark, then use it
    shared lock granted       whole -> use it; else its filler has died: begin again
    neither                   it is being filled: look again soon
    closed                    exclusive lock granted -> nobody else uses it: unlink

Locks are those of flock(2): the kernel takes them from a process that dies, however it dies. Whoever uses the content
holds a shared one. What a crash leaves behind is whole, and used again at once, or it is not, and filled again.
Containers share such memory only where they share /dev/shm (docker --ipc=host).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from memlane.native import Arena
from memlane.tables.errors import TableError
from memlane.tables.progress import Progress, in_words

__all__ = ["SHM", "SharedMemory"]

logger = logging.getLogger(__name__)

SHM = Path("/dev/shm")

_PREFIX = "memlane"
_MARK = b"memlane: all of it is there\n"
_PAGE = mmap.PAGESIZE
_LOOK_AGAIN = 0.05  # seconds
_SAY_AGAIN = 10.0
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_POPULATED_AT_ONCE = 1 << 30


class SharedMemory:
    """nbytes of memory that other processes see too, filled by one of them. One thread opens and closes it.

    arena: the memory; nobody writes to it. filled: whether this process filled it, rather than finding it there.
    """

    def __init__(
        self,
        key: str,
        nbytes: int,
        fill: Callable[[Arena], None],
        what: str,
        directory: Path = SHM,
    ) -> None:
        """Opens the memory that `key` names, or makes it with `fill`, which gets zeros and may raise.

        key: letters and digits that say all that the content depends on. what: for messages. Waits while another
        process fills it. TableError: no room (says what to do), or a file of somebody else's in its place.
        """
        self._what, self._nbytes, self._directory = what, nbytes, directory
        self._mark_at = -(-nbytes // _PAGE) * _PAGE
        self.path = directory / f"{_PREFIX}-{os.geteuid()}-{key}"
        self.filled = False
        said = -_SAY_AGAIN
        while True:
            found = self._try(fill)
            if found is not None:
                break
            if time.monotonic() - said > _SAY_AGAIN:
                said = time.monotonic()
                logger.info("%s: waiting for another process that fills %s", what, self.path)
            time.sleep(_LOOK_AGAIN)
        # At the end of the process at the latest; a crash leaves the file to whoever comes next.
        self._release = weakref.finalize(self, _release, found, self.path, os.getpid())
        self._arena = Arena.of_file(found, nbytes)

    @property
    def arena(self) -> Arena:
        return self._arena

    def close(self) -> None:
        """Gives the memory up; arrays of it stay valid. The last of all users removes it. Idempotent. Also a context manager."""
        self._release()

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _try(self, fill: Callable[[Arena], None]) -> int | None:
        """The file, whole and locked for use; None while another process fills it."""
        with self._opened() as opened:
            if _locked(opened, fcntl.LOCK_EX):
                if not self._is_there(opened):
                    return None  # its last user removed it just now
                if not self._is_whole(opened):
                    self._fill(opened, fill)
                # Not one operation: for a moment nobody has the lock, and the file may be removed.
                if not _locked(opened, fcntl.LOCK_SH):
                    return None
            elif not _locked(opened, fcntl.LOCK_SH):
                return None
            if not self._is_whole(opened) or not self._is_there(opened):
                return None
            return os.dup(opened)  # the lock belongs to the open file, whatever number it has

    @contextmanager
    def _opened(self) -> Iterator[int]:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            opened = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise TableError(f"{self._what}: {self.path}: {error.strerror}") from error
        try:
            status = os.fstat(opened)
            if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
                raise TableError(
                    f"{self._what}: {self.path} was made by somebody else (user {status.st_uid}); remove it"
                )
            yield opened
        finally:
            os.close(opened)

    def _is_there(self, opened: int) -> bool:
        """Whether the path still leads to this file."""
        try:
            return os.path.samestat(os.fstat(opened), self.path.stat())
        except FileNotFoundError:
            return False

    def _is_whole(self, opened: int) -> bool:
        if os.fstat(opened).st_size != self._mark_at + _PAGE:
            return False
        return os.pread(opened, len(_MARK), self._mark_at) == _MARK

    def _fill(self, opened: int, fill: Callable[[Arena], None]) -> None:
        try:
            self._reserve(opened)
            fill(Arena.of_file(opened, self._nbytes))
            os.pwrite(opened, _MARK, self._mark_at)
        except BaseException:
            self.path.unlink(missing_ok=True)  # nobody can use it, and it holds memory
            raise
        self.filled = True

    def _reserve(self, opened: int) -> None:
        """Takes all the memory now: a page that is refused later would end the process (SIGBUS)."""
        os.ftruncate(opened, 0)  # what a filler that died has left
        size = self._mark_at + _PAGE
        if self._free() < size:
            self._remove_unused()
        if self._free() < size:
            raise self._no_room(size)
        os.ftruncate(opened, size)
        _populate(opened, size, self._what)
        try:
            os.posix_fallocate(opened, 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
                raise TableError(f"{self._what}: {self.path}: {error.strerror}") from error
            raise self._no_room(size) from error

    def _free(self) -> int:
        found = os.statvfs(self._directory)
        # A memory file system without a limit says that it has no blocks at all.
        return found.f_bavail * found.f_frsize if found.f_blocks else 1 << 62

    def _remove_unused(self) -> None:
        """Removes what crashes of ours have left behind and nobody uses."""
        for path in self._directory.glob(f"{_PREFIX}-{os.geteuid()}-*"):
            if path == self.path:
                continue
            try:
                opened = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                continue  # gone, or not one of ours
            try:
                if _locked(opened, fcntl.LOCK_EX):
                    path.unlink(missing_ok=True)
                    logger.info("%s: removed %s, which nobody uses, to make room", self._what, path)
            finally:
                os.close(opened)

    def _no_room(self, size: int) -> TableError:
        found = os.statvfs(self._directory)
        return TableError(
            f"{self._what}: {in_words(size)} of shared memory are needed; {self._directory} has "
            f"{in_words(found.f_bavail * found.f_frsize)} free of {in_words(found.f_blocks * found.f_frsize)}. "
            f"Make it larger (mount -o remount,size=... {self._directory}; docker --shm-size=...; Kubernetes: an "
            "emptyDir of medium Memory mounted there), or do without shared memory"
        )


def _locked(opened: int, kind: int) -> bool:
    """Takes a lock, or changes the one that is held, if that can be had at once. A refusal loses what was held."""
    try:
        fcntl.flock(opened, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _populate(opened: int, size: int, what: str) -> None:
    """Takes the memory as huge pages where the system gives those to files in memory; else nothing, or plain pages."""
    progress = Progress(what, "of shared memory taken", size)
    try:
        with mmap.mmap(opened, size) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            for begin in range(0, size, _POPULATED_AT_ONCE):
                count = min(_POPULATED_AT_ONCE, size - begin)
                memory.madvise(_MADV_POPULATE_WRITE, begin, count)
                progress.advance(count)
    except OSError as error:  # whatever is missing then is asked for as plain pages
        logger.debug("shared memory is not populated at once: %s", error.strerror)


def _release(opened: int, path: Path, process: int) -> None:
    """Unlinks the file if nobody else uses it. Not in a forked child: it holds the same lock as its parent."""
    try:
        if process == os.getpid() and _locked(opened, fcntl.LOCK_EX):
            with contextlib.suppress(FileNotFoundError):  # somebody removed it by hand
                if os.path.samestat(os.fstat(opened), path.stat()):
                    path.unlink()
    finally:
        os.close(opened)
