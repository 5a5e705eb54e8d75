"""A pod that changes its folders as fast as it can: `python -m tests.net.racing ROOT PRIZE HOW`.

ROOT is its root, with run/kubevirt in it. PRIZE is a folder of root's outside of that, with the socket prize.sock in
it; the pod sees it as /prize, and cannot change it. HOW is "root", or "tenant": uid 107, which may mount in a user
namespace of its own. Says "ready", and races until it is killed.
"""

import ctypes
import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_RENAME_EXCHANGE, _BIND, _READ_ONLY, _DETACH = 2, 0x1000, 0x1021, 2
_NEWNS, _NEWUSER, _PRIVATE = 0x20000, 0x10000000, 0x44000

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """See the module."""
    root, prize, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if how == "tenant":
        os.setgroups([])
        os.setresgid(107, 107, 107)
        os.setresuid(107, 107, 107)
        _libc.prctl(4, 1)  # PR_SET_DUMPABLE: /proc/self is its own again
        _must(_libc.unshare(_NEWNS | _NEWUSER))
        for name, text in (("setgroups", "deny"), ("uid_map", "0 107 1"), ("gid_map", "0 107 1")):
            Path(f"/proc/self/{name}").write_text(text)
    else:
        _must(_libc.unshare(_NEWNS))
    _must(_libc.mount(None, b"/", None, _PRIVATE, None))
    _mount(root, root)
    _mount(prize, root / "prize")
    if how == "root":
        _must(_libc.mount(None, bytes(root / "prize"), None, _READ_ONLY, None))
    os.chroot(root)
    os.chdir("/")
    seen = Path("/prize")
    chance = random.Random(0)
    places = [Path("/run"), Path("/run/kubevirt"), Path("/run/kubevirt/migrationproxy")]
    tricks: list[tuple[Callable[[Path], object], Callable[[Path], object]]] = [
        (lambda place: _mount(seen, place), _unmount),
        (lambda place: _swap(place, place.with_name("link")),) * 2,
        (lambda place: _swap(place, place.with_name("other")),) * 2,
        (lambda place: _swap(places[2], place / "kubevirt"),) * 2,
        (lambda place: _mount(seen / "prize.sock", place / "x.sock"), lambda place: _unmount(place / "x.sock")),
        (lambda place: _mount(seen / "prize.sock", _temporary(place)), lambda place: _unmount(_temporary(place))),
        (lambda place: os.symlink(prize / "prize.sock", place / "x.sock"), lambda place: os.unlink(place / "x.sock")),
        (lambda place: os.symlink(prize, place / ".migproxy-new"), lambda place: os.unlink(place / ".migproxy-new")),
        (lambda place: os.rename(place / ".migproxy-new", place / "taken"), lambda place: os.rmdir(place / "taken")),
        (lambda place: (place / "migrationproxy").rmdir(), lambda _: None),
    ]
    for place in places[:2]:
        place.with_name("link").symlink_to(prize)
        place.with_name("other").mkdir()
    (places[1] / "link").symlink_to(prize)
    (places[1] / "other").mkdir()
    print("ready", flush=True)
    while True:
        (do, undo), place, pause = chance.choice(tricks), chance.choice(places), chance.randrange(1000)
        with suppress(OSError, StopIteration):
            do(place)
            for _ in range(pause):
                pass
        with suppress(OSError, StopIteration):
            undo(place)


def _mount(what: Path, where: Path) -> None:
    _must(_libc.mount(bytes(what), bytes(where), None, _BIND, None))


def _unmount(where: Path) -> None:
    _must(_libc.umount2(bytes(where), _DETACH))


def _temporary(folder: Path) -> Path:
    """Where a socket is being made."""
    return next(folder.glob(".migproxy-*"))


def _swap(one: Path, other: Path) -> None:
    _must(_libc.renameat2(-100, bytes(one), -100, bytes(other), _RENAME_EXCHANGE))


def _must(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    main()
