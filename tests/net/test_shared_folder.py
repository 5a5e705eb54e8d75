"""Our socket and virt-handler's at one path: whatever the order of their steps, the path leads to a listener.

The first tests are examples. The last one is a model: every interleaving of virt-handler's steps with each single
system call of ours that changes the folder, with our being killed at each of them, on real sockets in a real folder.
"""

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from traceback import walk_tb

import pytest

from migproxy.launcher import LauncherError, RunDir
from migproxy.portmap import Channel, source_socket_name
from migproxy.proxy import ProxyError
from migproxy.shared import SharedFolder
from migproxy.source import SocketFile
from tests.faults import Faults, injected
from tests.virt_handler import VirtHandler, shortened

pytestmark = pytest.mark.tier("gate")

KEY = "uid"
NAME = source_socket_name(KEY, Channel.LIBVIRT)
TARGET = ("10.1.1.2", {"1000": 0})


class Killed(BaseException):
    """We are killed at this very moment: nothing of ours runs any more."""


class Folder(SharedFolder):
    """A shared folder that lets others in before each of its changes.

    Attributes:
        before: Called before each change.
    """

    before: Callable[[], None] = staticmethod(lambda: None)

    def _rename(self, old: str, new: str, flags: int) -> None:
        self.before()
        super()._rename(old, new, flags)

    def _unlink(self, name: str) -> None:
        self.before()
        super()._unlink(name)

    def give(self, fd: int, path: str) -> None:
        self.before()
        super().give(fd, path)


class Scene:
    """A launcher's folder, virt-handler, and us.

    Attributes:
        path: Of the libvirt channel's socket.
        asked: Whether virt-handler has asked the launcher to migrate, and not stopped since; how often it asked.
    """

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory
        (directory / "kubevirt/migrationproxy").mkdir(parents=True, exist_ok=True)
        self.path = directory / "kubevirt/migrationproxy" / NAME
        for left in self.path.parent.iterdir():
            left.unlink()
        self.virt_handler = VirtHandler("10.1.1.1", directory, "libvirt/libvirt-sock", owner=(os.getuid(), os.getgid()))
        self.theirs: socket.socket | None = None
        self.ours: list[SocketFile] = []
        self.asked = (False, 0)
        with RunDir(str(directory), "") as run:
            self.folder = Folder(run, (os.getuid(), os.getgid()))

    def close(self) -> None:
        self.stop()
        for file in self.ours:
            file.listener.close()
        self.folder.close()

    # virt-handler

    def remove(self) -> None:
        if self.theirs is not None:
            self.theirs.close()
        self.virt_handler.remove(KEY, Channel.LIBVIRT)

    def bind(self) -> None:
        try:
            self.virt_handler.bind(KEY, Channel.LIBVIRT, TARGET)
        except OSError as error:
            # It was given back just now: virt-handler tries again, as after any error.
            if error.errno != errno.EADDRINUSE or self.is_ours():
                raise
            self.listen()
        self.theirs = self.virt_handler.sources[KEY].servers[Channel.LIBVIRT]
        self.theirs.setblocking(False)

    def listen(self) -> None:
        self.remove()
        self.bind()

    def give(self) -> None:
        self.virt_handler.give(KEY, Channel.LIBVIRT)
        self.asked = (True, self.asked[1] + 1)

    def stop(self) -> None:
        """Closes, and removes what is at the path, as Go does."""
        self.asked = (False, self.asked[1])
        if self.theirs is not None:
            self.theirs.close()
            self.theirs = None
            self.virt_handler.remove(KEY, Channel.LIBVIRT)

    # Us

    def is_ours(self) -> bool:
        return bool(self.path.stat().st_mode & stat.S_ISVTX)

    def place(self) -> None:
        """What the source proxy does once it looks; the listener before is kept, as it does."""
        if not (self.ours and self.folder.holds(NAME, self.ours[-1])) and self.folder.invites(NAME):
            self.ours += filter(None, [self.folder.place(NAME)])

    def leave(self) -> None:
        if self.ours:
            self.folder.remove(NAME, self.ours[-1])
        else:
            self.folder.mend(NAME)
        for file in self.ours:
            file.listener.close()
        self.ours.clear()

    def reach(self) -> str:
        """Whose listener a connection reaches that ours hands over to virt-handler."""
        with self.folder.kept(NAME) as node, socket.socket(socket.AF_UNIX) as near:
            node.connect(near)
            assert self.theirs
            self.theirs.accept()[0].close()
        return "virt-handler"

    def kill(self) -> None:
        """Nothing is cleared."""
        for file in self.ours:
            file.listener.close()
        self.ours.clear()

    def is_swapped(self) -> bool:
        """Whether virt-handler's last socket is kept aside, and the one before, which is closed, stands at the path."""
        return (
            self.theirs is not None
            and self.path.exists()
            and not self.is_ours()
            and self.dial() == "nobody: [Errno 111] Connection refused"
        )

    # The launcher

    def dial(self) -> str:
        """Whose listener a connection by the path reaches."""
        with socket.socket(socket.AF_UNIX) as near:
            try:
                with shortened(self.path) as path:
                    near.connect(path)
            except OSError as error:
                return f"nobody: {error}"
            for who, listeners in (("us", [file.listener for file in self.ours]), ("virt-handler", [self.theirs])):
                for listener in filter(None, listeners):
                    with suppress(BlockingIOError):
                        listener.accept()[0].close()
                        return who
        return "us"  # one that is just being made: a closed one refuses


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.close()


def test_path_is_ours_once_virt_handler_listens_and_its_own_again_when_we_leave(scene: Scene) -> None:
    scene.listen()
    scene.give()
    assert scene.dial() == "virt-handler"
    scene.place()
    assert scene.dial() == "us"
    scene.leave()
    assert scene.dial() == "virt-handler"
    assert {path.name for path in scene.path.parent.iterdir()} == {NAME}


@pytest.mark.root
def test_virt_handlers_socket_goes_to_qemus_user_though_virt_handler_finds_ours_there(scene: Scene) -> None:
    given: list[str] = []
    scene.folder.owner = (os.getuid(), os.getgid() + 1)
    scene.listen()
    scene.place()
    scene.give()
    scene.leave()
    given.append(scene.dial())
    assert given == ["virt-handler"]
    assert scene.path.stat().st_gid == os.getgid() + 1


def test_what_is_missing_is_virt_handlers_to_fill(scene: Scene) -> None:
    for _ in range(3):
        assert not scene.folder.invites(NAME)
        scene.place()
        assert not scene.path.exists()
        scene.bind()
        assert scene.folder.invites(NAME)
        scene.place()
        assert scene.dial() == "us"
        scene.remove()
        scene.place()
        scene.bind()
        scene.place()
        assert scene.dial() == "us"
        scene.stop()


def test_what_stood_there_before_ours_can_still_be_reached(scene: Scene) -> None:
    with pytest.raises(LauncherError, match="No such file"):
        scene.reach()
    scene.listen()
    scene.place()
    assert scene.reach() == "virt-handler"
    scene.listen()
    scene.place()
    assert scene.reach() == "virt-handler"
    scene.stop()
    with pytest.raises(LauncherError, match="Connection refused"):
        scene.reach()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_the_pod_puts_in_the_place_of_virt_handlers_socket_is_not_followed(scene: Scene, kind: str) -> None:
    """A link would be followed by root, in the node's own file system."""
    scene.listen()
    scene.place()
    kept = scene.path.with_name(f".virt-handler-{NAME}")
    with socket.socket(socket.AF_UNIX) as nodes:
        nodes.bind(str(scene.run_dir / "a-socket-of-the-node"))
        nodes.listen()
        kept.unlink()
        if kind == "link":
            kept.symlink_to(scene.run_dir / "a-socket-of-the-node")
        else:
            kept.write_text("no socket")
        with pytest.raises(LauncherError, match=r"never followed|not a socket"):
            scene.reach()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_an_error_of_a_look_takes_nothing_of_virt_handlers_away(scene: Scene, tmp_path: Path, number: int) -> None:
    faults = Faults(tmp_path / "faults")
    scene.listen()
    scene.place()
    with injected(faults), faults.failing("openat2", number, scene.path.parent):
        scene.leave()
        for look in (scene.folder.invites, scene.folder.place, scene.folder.mend):
            with pytest.raises(ProxyError, match=os.strerror(number)):
                look(NAME)
    assert scene.folder.mend(NAME)
    assert scene.dial() == "virt-handler"
    assert {path.name for path in scene.path.parent.iterdir()} == {NAME}


@pytest.mark.parametrize("failing", range(1, 7))
def test_a_look_that_fails_while_ours_is_put_there_leaves_virt_handlers_in_reach(scene: Scene, failing: int) -> None:
    """Of the looks that one placing takes, each fails in turn, and all after it."""
    look, looks = scene.folder._open, 0

    def open_failing(name: str) -> int:
        nonlocal looks
        looks += 1
        if looks >= failing:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return look(name)

    scene.listen()
    with pytest.MonkeyPatch.context() as patch, suppress(ProxyError):
        patch.setattr(scene.folder, "_open", open_failing)
        scene.place()
    assert scene.dial() in ("virt-handler", "us")
    scene.place()
    assert scene.dial() == "us"
    scene.leave()
    assert scene.dial() == "virt-handler"


def test_what_virt_handler_removes_while_ours_is_being_put_there_is_left_to_virt_handler(scene: Scene) -> None:
    scene.listen()
    steps = [scene.remove]
    scene.folder.before = lambda: steps.pop()() if steps else None
    scene.place()
    scene.bind()
    assert scene.dial() == "virt-handler"
    assert {path.name for path in scene.path.parent.iterdir()} == {NAME}


def test_dead_socket_of_a_virt_handler_that_has_ended_is_not_put_back(scene: Scene) -> None:
    scene.listen()
    scene.place()
    scene.stop()
    scene.place()
    scene.leave()
    assert list(scene.path.parent.iterdir()) == []


def test_nothing_is_left_where_virt_handlers_socket_cannot_be_given_to_qemus_user(scene: Scene) -> None:
    scene.listen()

    def refuse(fd: int, path: str) -> None:
        if stat.S_IMODE(os.stat(f"/proc/self/fd/{fd}").st_mode) & stat.S_ISVTX == 0:
            raise ProxyError("not permitted")

    scene.folder.give = refuse  # type: ignore[method-assign]
    with pytest.raises(ProxyError, match="not permitted"):
        scene.place()
    assert scene.dial() == "virt-handler"
    assert {path.name for path in scene.path.parent.iterdir()} == {NAME}


def test_at_the_end_nothing_is_put_where_virt_handler_has_removed_it(scene: Scene) -> None:
    scene.listen()
    scene.place()
    scene.stop()
    scene.leave()
    assert list(scene.path.parent.iterdir()) == []


def test_who_ends_leaves_what_the_next_one_has_put_there(scene: Scene) -> None:
    """Two migrations of one VMI have the same names."""
    scene.listen()
    scene.place()
    before = scene.ours[-1]
    scene.remove()
    scene.bind()
    scene.place()
    scene.folder.remove(NAME, before)
    assert scene.dial() == "us"
    assert scene.reach() == "virt-handler"


def test_killed_daemons_successor_takes_the_path_and_gives_virt_handlers_socket_back(scene: Scene) -> None:
    scene.listen()
    scene.place()
    scene.kill()
    assert scene.dial().startswith("nobody")
    scene.place()
    assert scene.dial() == "us"
    scene.leave()
    assert scene.dial() == "virt-handler"


@pytest.mark.parametrize("how", ["left", "mended"])
def test_virt_handlers_socket_that_cannot_be_given_back_is_kept_until_it_can(scene: Scene, how: str) -> None:
    failures = [OSError(errno.EIO, "Input/output error")]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    scene.listen()
    scene.place()
    scene.folder.before = fail_once
    if how == "left":
        scene.leave()
    else:
        scene.kill()
        with pytest.raises(ProxyError, match=f"{NAME} cannot be given back to virt-handler: Input/output error"):
            scene.folder.mend(NAME)
    assert not failures
    assert scene.folder.mend(NAME)
    assert scene.dial() == "virt-handler"
    assert not scene.folder.mend(NAME)
    assert {path.name for path in scene.path.parent.iterdir()} == {NAME}


def test_socket_of_ours_has_its_mark_from_its_first_moment(scene: Scene) -> None:
    modes: list[int] = []

    def look() -> None:
        temporary = [path for path in scene.path.parent.iterdir() if path.name.startswith(".migproxy-")]
        modes.extend(path.stat().st_mode for path in temporary)

    scene.listen()
    scene.folder.before = look
    scene.place()
    assert modes[0] & stat.S_ISVTX, "later, virt-handler's stands there"


# The model

VIRT_HANDLER = ("remove", "bind", "give", "stop", "remove", "bind", "give")
"""It prepares, finds the target's ports changed, and prepares anew."""

OURS = ("place", "place-leave", pytest.param("place-place-leave", marks=pytest.mark.tier("soak")), "kill-place-leave")


class Schedule:
    """Lets virt-handler take its next steps at given moments, of which each of our changes is one.

    Args:
        counts: How many steps it takes at each moment; those that are left are taken at the end.
        killed_at: The moment at which we are killed.

    Attributes:
        moment: How many moments there have been.
        taken: At which moment it has taken which step.
    """

    def __init__(self, scene: Scene, counts: tuple[int, ...], killed_at: int | None) -> None:
        self._scene, self._counts, self._killed_at = scene, counts, killed_at
        self._steps = list(VIRT_HANDLER)
        self.moment = 0
        self.taken: list[tuple[int, str]] = []

    def __call__(self) -> None:
        for _ in range(self._counts[self.moment] if self.moment < len(self._counts) else 0):
            self._step()
        self.moment += 1
        if self.moment - 1 == self._killed_at:
            raise Killed

    def finish(self) -> None:
        while self._steps:
            self._step()

    def _step(self) -> None:
        name = self._steps.pop(0)
        self.taken.append((self.moment, name))
        try:
            getattr(self._scene, name)()
        except FileNotFoundError:  # it was replaced in the very moment in which it was given back
            assert name == "give"
            for again in ("listen", "give"):  # as virt-handler does after any error
                getattr(self._scene, again)()


def explore(run_once: Callable[[tuple[int, ...]], int]) -> None:
    """Runs every schedule there is, each once: virt-handler's steps at all the moments that the runs turn out to have.

    Args:
        run_once: Runs a schedule, and returns how many moments it had.
    """
    pending: list[tuple[int, ...]] = [()]
    while pending:
        counts = pending.pop()
        moments = run_once(counts)
        left = len(VIRT_HANDLER) - sum(counts)
        for moment in range(len(counts), moments):
            none_yet = (*counts, *(0 for _ in range(len(counts), moment)))
            pending += [(*none_yet, steps) for steps in range(1, left + 1)]


@pytest.mark.parametrize("ours", OURS)
def test_every_interleaving_leaves_the_path_to_a_listener(tmp_path: Path, ours: str) -> None:
    def run_once(counts: tuple[int, ...]) -> int:
        scene = Scene(tmp_path)
        schedule = Schedule(scene, counts, None)
        try:
            run(scene, tuple(ours.split("-")), schedule)
        finally:
            scene.close()
        return schedule.moment

    explore(run_once)


@pytest.mark.tier("soak")
def test_killed_at_any_call_the_successor_mends_it(tmp_path: Path) -> None:
    """Virt-handler's steps are taken at every moment of the life that is cut off, and at the first of the next one."""
    kills, first_life = 0, 9

    def run_once(counts: tuple[int, ...], killed_at: int) -> int:
        nonlocal kills
        scene = Scene(tmp_path)
        schedule = Schedule(scene, counts, killed_at)
        try:
            try:
                run(scene, ("place", "leave"), schedule)
                assert schedule.moment <= first_life
                return schedule.moment
            except Killed as killed:
                kills += 1
                scene.kill()
                for frame, _ in walk_tb(killed.__traceback__):  # the kernel closes what was just being made
                    if isinstance(listener := frame.f_locals.get("listener"), socket.socket):
                        listener.close()
            # Killed after it gave back a socket that virt-handler replaced in that microsecond: nobody could tell.
            if not scene.is_swapped():
                run(scene, ("place", "leave"), schedule, is_killed=True)
            return min(schedule.moment, first_life)
        finally:
            scene.close()

    killed_at, before = 0, -1
    while kills > before:
        before = kills
        explore(partial(run_once, killed_at=killed_at))
        killed_at += 1


def run(scene: Scene, ours: tuple[str, ...], schedule: Schedule, *, is_killed: bool = False) -> None:
    """Our steps, with virt-handler's at their moments; the launcher dials whenever it may.

    It may once it has been asked, which takes longer than one step of ours: that in which virt-handler asks is over.
    """
    may_dial = (False, 0)

    def between() -> None:
        nonlocal may_dial
        schedule()
        if may_dial != scene.asked:
            may_dial = (False, 0)
        check()

    def check() -> None:
        if may_dial[0] and not is_killed:
            who = scene.dial()
            assert who in ("us", "virt-handler"), f"{who}, before moment {schedule.moment} of {ours}: {schedule.taken}"

    for step in ours:
        scene.folder.before = lambda: None
        between()
        may_dial = scene.asked
        scene.folder.before = between
        getattr(scene, step)()
        is_killed, may_dial = step == "kill", scene.asked
        check()
        scene.folder.before = lambda: None
        if step == "place":
            scene.place()  # what came while ours was being placed is told by inotify
            if scene.asked[0]:
                assert scene.dial() == "us"
    scene.folder.before = lambda: None
    schedule.finish()
    may_dial = scene.asked
    check()
    if ours[-1] == "leave":
        assert scene.dial() == "virt-handler"
        assert {path.name for path in scene.path.parent.iterdir()} == {NAME}
