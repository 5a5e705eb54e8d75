"""Runs a command whose setgroups(2) does nothing and succeeds.

libvirtd sets the supplementary groups of every QEMU it starts, and the kernel refuses that in a user
namespace that an unprivileged user made (user_namespaces(7)). A seccomp filter answers in its place.

    python setgroups.py COMMAND [ARGUMENT...]
"""

import ctypes
import os
import struct
import sys

_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # instructions of the filter's machine (linux/bpf_common.h)
_ALLOW, _ANSWER_0 = 0x7FFF0000, 0x00050000  # linux/seccomp.h: SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | 0
_SETGROUPS = 116  # on x86_64
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


def main() -> None:
    """Installs the filter, and becomes the command."""
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (_LOAD, 0, 0, 0),  # the number of the system call
            (_JUMP_IF_EQUAL, 0, 1, _SETGROUPS),
            (_RETURN, 0, 0, _ANSWER_0),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
