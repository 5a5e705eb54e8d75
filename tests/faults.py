"""Errors of the kernel, injected where migproxy calls it: in this process, or in a daemon.

`python -m tests.faults FILE COMMAND...` runs a daemon in which they are.
"""

import builtins
import ctypes
import io
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import asyncinotify

from migproxy import beneath

INOTIFY = Path("anon_inode:inotify")
"""What inotify's own calls are told to be below."""

_open, _readlink = os.open, os.readlink
_open_file = builtins.open


class Faults:
    """Says which call fails: what stands in a file, which another process may write.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def failing(self, call: str, number: int, below: Path) -> Iterator[None]:
        """Within it, a call fails.

        Args:
            call: One of those in `injected`.
            number: Its errno.
            below: For the paths that begin so.
        """
        new = self._path.with_name(f".{self._path.name}")
        new.write_text(f"{call} {number} {below}")
        new.rename(self._path)
        try:
            yield
        finally:
            self._path.unlink()

    def of(self, call: str, path: object) -> int:
        """The errno that a call has to fail with; 0 where it has not."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return 0
        try:
            fd = _open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return 0
        with _open_file(fd) as file:
            wanted, number, below = file.read().split(" ", 2)
        return int(number) if wanted == call and os.fsdecode(path).startswith(below) else 0


@contextmanager
def injected(faults: Faults) -> Iterator[None]:
    """Within it, this process's calls fail as they are told to."""

    def failing(call: str, function: Callable[..., Any], path_of: Callable[..., object]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            path = path_of(*arguments)
            if number := faults.of(call, path):
                raise OSError(number, os.strerror(number), path)
            return function(*arguments, **options)

        return wrapper

    def open_failing(path: Any, *arguments: Any, **options: Any) -> Any:
        if number := faults.of("open", path):
            raise OSError(number, os.strerror(number), path)
        file = _open_file(path, *arguments, **options)
        if number := faults.of("read", path):
            file.close()
            return _Unreadable(number)
        return file

    def syscall_failing(number: int, folder: int, path: bytes, *rest: Any) -> int:
        where = f"{_readlink(f'/proc/self/fd/{folder}')}/{os.fsdecode(path)}"
        if error := faults.of("openat2", where):
            ctypes.set_errno(error)
            return -1
        return int(beneath_syscall(number, folder, path, *rest))

    libc, beneath_syscall = asyncinotify._ffi.libc, beneath._libc.syscall
    calls: list[tuple[Any, str, Callable[..., Any]]] = [
        (os, name, failing(name, getattr(os, name), lambda path=".", *_: path))
        for name in ("listdir", "stat", "lstat", "readlink")
    ]
    calls += [
        (builtins, "open", open_failing),
        (os, "read", failing("inotify_read", os.read, lambda fd, *_: _target(fd))),
        (beneath._libc, "syscall", syscall_failing),
        (libc, "inotify_init1", failing("inotify_init1", libc.inotify_init1, lambda *_: INOTIFY)),
        (
            libc,
            "inotify_add_watch",
            failing("inotify_add_watch", libc.inotify_add_watch, lambda _, path, *__: _followed(path)),
        ),
    ]
    with ExitStack() as stack:
        for owner, name, wrapper in calls:
            stack.enter_context(patch.object(owner, name, wrapper))
        yield


class _Unreadable(io.RawIOBase):
    """A file that has been opened, and cannot be read."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def read(self, size: int = -1) -> bytes:
        raise OSError(self._number, os.strerror(self._number))


def _target(fd: int) -> str:
    return _readlink(f"/proc/self/fd/{fd}")


def _followed(path: bytes) -> str:
    """The folder that a descriptor refers to, where the path is a descriptor's."""
    name = os.fsdecode(path)
    return _readlink(name) if name.startswith("/proc/self/fd/") else name


if __name__ == "__main__":
    told, _, _, module, *words = sys.argv[1:]
    sys.argv[1:] = words
    with injected(Faults(Path(told))):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
