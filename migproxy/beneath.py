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
    """Opens what stands at a path below a folder, with O_PATH; the caller closes it.

    Args:
        folder: The folder, open.
        path: Relative, without "." and "..".
        is_folder: Whether a folder must stand there; else it may be anything, a symbolic link itself included.
        one_mount: Whether everything on the way must be on the folder's own mount.

    Raises:
        OSError: ELOOP or ENOTDIR for a link on the way, EXDEV for another mount, and what open(2) says.
    """
    how = _How(_NODE | (os.O_DIRECTORY if is_folder else 0), 0, _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS)
    if one_mount:
        how.resolve |= _NO_XDEV
    fd = int(_libc.syscall(_OPENAT2, folder, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how)))
    if fd >= 0:
        return fd
    number = ctypes.get_errno()
    if number not in (errno.ENOSYS, errno.EPERM):  # before Linux 5.6; where a seccomp profile does not know it
        raise OSError(number, os.strerror(number))
    fd = os.dup(folder)
    components = path.split("/")
    for left, component in enumerate(components, 1 - len(components)):
        try:
            inside = os.open(component, _NODE | (os.O_DIRECTORY if is_folder or left else 0), dir_fd=fd)
        finally:
            os.close(fd)
        fd = inside
        try:
            if one_mount and mount_of(fd) != mount_of(folder):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        except OSError:
            os.close(fd)
            raise
    return fd


def mount_of(fd: int) -> str:
    """The ID of the mount that a descriptor has been opened on, no other's while it is open (proc(5), Linux 3.15)."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        return next(line.split()[1] for line in info if line.startswith("mnt_id:"))


def file_system_of(fd: int, mounts: bytes) -> str | None:
    """The type of the file system that a descriptor has been opened on, without asking that.

    Args:
        fd: The descriptor.
        mounts: What mountinfo of a process says (proc(5)); read after the descriptor was opened.

    Returns:
        As mount(8) names it; None where the process does not see the mount.
    """
    mount = mount_of(fd).encode()
    for line in mounts.split(b"\n"):  # the kernel escapes a space and a newline in a path, and no other white space
        words = line.split(b" ")
        if words[0] == mount:
            return words[words.index(b"-", 6) + 1].decode()
    return None
