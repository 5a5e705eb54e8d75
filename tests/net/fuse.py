"""A file system in user space that answers nothing: as a pod may mount one."""

import ctypes
import os
import select
import struct
import threading
from pathlib import Path

_INIT = 26  # linux/fuse.h, version 7.31
_HEADER = struct.Struct("<IIQQIIII")
_DETACH = 2  # umount2(2)

_libc = ctypes.CDLL(None, use_errno=True)


class Silent:
    """Mounted at a folder until it is closed; reads what it is asked, and never answers.

    Attributes:
        asked: How many requests have come, without the kernel's first one.

    Args:
        where: The folder.
    """

    def __init__(self, where: Path) -> None:
        self.asked = 0
        self._where = where
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._ending = os.eventfd(0)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other"
        if _libc.mount(b"silent", os.fsencode(where), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), f"cannot mount on {where}")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Unmounts it; who waits for it gets an error."""
        _libc.umount2(os.fsencode(self._where), _DETACH)
        os.eventfd_write(self._ending, 1)
        self._thread.join(10)
        os.close(self._fd)  # the kernel ends the connection with it
        os.close(self._ending)

    def _serve(self) -> None:
        while self._ending not in select.select([self._fd, self._ending], [], [])[0]:
            try:
                _, kind, unique, *_ = _HEADER.unpack_from(os.read(self._fd, 1 << 17))
            except OSError:  # unmounted
                return
            if kind == _INIT:
                told = struct.pack("<IIIIHHII", 7, 31, 0, 0, 0, 0, 4096, 1).ljust(64, b"\0")
                os.write(self._fd, struct.pack("<IiQ", 16 + len(told), 0, unique) + told)
            else:
                self.asked += 1
