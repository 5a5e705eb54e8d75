"""Opening below a folder that is not trusted: no symbolic link is followed, and no mount entered where told so."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

_OPENAT2: Final = 437  # the same on every architecture (linux/unistd.h); not among Python's functions
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x01, 0x02, 0x04, 0x08  # linux/openat2.h
_NODE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class _How(ctypes.Structure):
    """struct open_how of openat2(2)."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(folder: int, path: str, *, is_folder: bool, one_mount: bool) -> int:
    """Opens what stands at a path below a folder, with O_PATH and in one call; the caller closes it.

    Args:
        folder: The folder, open.
        path: Relative, without "." and "..".
        is_folder: Whether a folder must stand there; else it may be anything, a symbolic link itself included.
        one_mount: Whether everything on the way must be on the folder's own mount.

    Raises:
        OSError: See openat2(2): ELOOP for a link on the way, EXDEV for another mount, ENOSYS before Linux 5.6 (and
            EPERM where a seccomp profile does not know it).
    """
    how = _How(_NODE | (os.O_DIRECTORY if is_folder else 0), 0, _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS)
    if one_mount:
        how.resolve |= _NO_XDEV
    fd = _libc.syscall(_OPENAT2, folder, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(fd)


def open_component(folder: int, name: str, *, is_folder: bool, one_mount: bool) -> int:
    """`open_beneath` of a single component, on every kernel.

    Raises:
        OSError: ENOTDIR for a link where a folder must stand, EXDEV for another mount.
    """
    fd = os.open(name, _NODE | (os.O_DIRECTORY if is_folder else 0), dir_fd=folder)
    if one_mount and _mount(fd) != _mount(folder):
        os.close(fd)
        raise OSError(errno.EXDEV, "another file system is mounted there")
    return fd


def _mount(fd: int) -> str:
    """The ID of the mount that a descriptor has been opened on (proc(5), Linux 3.15)."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        return next(line for line in info if line.startswith("mnt_id:"))
