"""Files, folders and sockets in folders that others may write to as well, such as /tmp (mode 1777).

Somebody may have planted something there beforehand: a symbolic link or a hard link to a file of root's, a FIFO that
whoever opens it waits for, a file whose lock is never free. None of it is followed, written to, given another mode,
or waited for: it is refused. Who counts as a stranger is decided as the kernel does for sticky folders
(Documentation/admin-guide/sysctl/fs.rst: protected_regular, protected_symlinks), whether these sysctls are set or not.

What is made here is never wider than it says, whatever the umask. A file that an option names is the administrator's
own choice, wherever links lead: all that is asked of it is that it ends.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Final

_REMEDY: Final = "remove it, or give another path"


class Planted(OSError):
    """What stands there is not ours; `strerror` says what it is, and what to do."""


def make_folder(path: str) -> None:
    """Makes a folder, and those on the way to it, with mode 0755.

    Args:
        path: Of the folder; one that exists is left as it is.

    Raises:
        Planted: A file stands there, or somebody else's folder or link to one.
        OSError: It cannot be made.
    """
    path = os.path.abspath(path)
    if not os.path.lexists(path):
        make_folder(os.path.dirname(path))
        umask = os.umask(0o022)
        try:
            with suppress(FileExistsError):  # somebody was faster: the failsafe, or a stranger
                os.mkdir(path)
        finally:
            os.umask(umask)
    _check_owner(path, os.lstat(path))
    if not os.path.isdir(path):
        raise Planted(errno.ENOTDIR, f"{path} is no folder: {_REMEDY}")


def open_file(path: str, flags: int) -> int:
    """Opens a regular file; with O_CREAT in the flags it is made with mode 0600, and its folder too.

    Args:
        path: Of the file.
        flags: As for open(2); never O_TRUNC, which comes before the look at what is opened.

    Returns:
        Its descriptor, which the caller closes.

    Raises:
        Planted: Something else stands there, or a file of somebody else's.
        OSError: It cannot be opened or made.
    """
    if flags & os.O_CREAT:
        make_folder(os.path.dirname(path))
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError:
        with suppress(FileNotFoundError, NotADirectoryError):
            _check_file(path, os.lstat(path))
        raise
    try:
        _check_file(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_regular(path: str, most: int = 16 << 20) -> bytes:
    """Reads a file that an option names. A link is followed, as Kubernetes makes them of ConfigMaps and Secrets.

    Args:
        path: Of the file.
        most: Bytes that it may have.

    Raises:
        OSError: It cannot be read, is larger, or is no regular file: others may never answer or end.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file: give one", path)
        with open(fd, "rb", closefd=False) as file:
            content = file.read(most + 1)
    finally:
        os.close(fd)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", path)
    return content


def write_file(path: str, text: str) -> None:
    """Puts text into a file of mode 0644 in one step: another one takes its place.

    Args:
        path: Of the file; its folder is made if need be.
        text: What it holds then.

    Raises:
        Planted: Something else stands there, or a file of somebody else's.
        OSError: It cannot be written.
    """
    make_folder(os.path.dirname(path))
    with suppress(FileNotFoundError):
        _check_file(path, os.lstat(path))
    temporary = f"{path}.{secrets.token_hex(8)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def bind(sock: socket.socket, path: str, mode: int) -> None:
    """Binds a unix socket in place of one that a dead process has left; its folder is made if need be.

    Args:
        sock: Not bound yet; the caller's.
        path: Where.
        mode: Of the socket's file, exactly: nobody else may connect before that.

    Raises:
        Planted: No socket stands there, or one of somebody else's.
        OSError: Somebody listens there, or it cannot be bound; `strerror` says what to do.
    """
    make_folder(os.path.dirname(path))
    with suppress(FileNotFoundError):
        _check(path, os.lstat(path), stat.S_ISSOCK, "socket")
        if _is_listened_at(path, sock.type):
            why = "another migproxy answers there; stop it, or give this one a socket of its own"
            raise OSError(errno.EADDRINUSE, why, path)
        os.unlink(path)
    umask = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
    finally:
        os.umask(umask)


def _is_listened_at(path: str, kind: int) -> bool:
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:  # so many wait there already
            return True
    return True


def _check_file(path: str, status: os.stat_result) -> None:
    _check(path, status, stat.S_ISREG, "regular file")
    if status.st_nlink > 1:
        raise Planted(errno.EMLINK, f"a hard link to another file stands there: {_REMEDY}", path)


def _check(path: str, status: os.stat_result, is_kind: Callable[[int], bool], kind: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise Planted(errno.ELOOP, f"a symbolic link stands there, and is not followed: {_REMEDY}", path)
    if not is_kind(status.st_mode):
        raise Planted(errno.EEXIST, f"what stands there is no {kind}: {_REMEDY}", path)
    _check_owner(path, status)


def _check_owner(path: str, status: os.stat_result) -> None:
    """Looks whose a file or folder is, and each folder on the way to it.

    Who else may write to a folder can have put there what is its own; everything else is its owner's doing.
    """
    path = os.path.abspath(path)
    while True:
        parent = os.path.dirname(path)
        folder = os.stat(parent)
        is_open = folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if is_open and status.st_uid not in (0, os.geteuid(), folder.st_uid):
            raise Planted(errno.EACCES, f"{path} belongs to user {status.st_uid}: {_REMEDY}")
        if parent == path:
            return
        path, status = parent, os.lstat(parent)
