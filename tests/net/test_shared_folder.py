"""Our socket and virt-handler's at one path: whatever the order of their steps, the path leads to a listener.

The first tests are examples. The last one is a model: every interleaving of virt-handler's steps with each single
system call of ours that changes the folder, with our being killed at each of them, on real sockets in a real folder.
"""

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from traceback import walk_tb

import pytest

from migproxy.launcher import RunDir
from migproxy.portmap import Channel, source_socket_name
from migproxy.shared import SharedFolder
from migproxy.source import SocketFile
from tests.virt_handler import VirtHandler

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

    patience = 0.0  # what is missing is missing for too long
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
        self.virt_handler.remove(KEY, Channel.LIBVIRT)

    def listen(self) -> None:
        if self.theirs is not None:
            self.theirs.close()
        self.remove()
        self.virt_handler.bind(KEY, Channel.LIBVIRT, TARGET)
        self.theirs = self.virt_handler.sources[KEY].servers[Channel.LIBVIRT]
        self.theirs.setblocking(False)

    def give(self) -> None:
        self.virt_handler.give(KEY, Channel.LIBVIRT)
        self.asked = (True, self.asked[1] + 1)

    def stop(self) -> None:
        """Closes, and removes what is at the path, as Go does."""
        self.asked = (False, self.asked[1])
        if self.theirs is not None:
            self.theirs.close()
            self.theirs = None
            self.remove()

    # Us

    def place(self) -> None:
        """What the source proxy does once it looks; the listener before is kept, as it does."""
        if not (self.ours and self.folder.holds(NAME, self.ours[-1])) and self.folder.invites(NAME):
            self.ours.append(self.folder.place(NAME))

    def leave(self) -> None:
        for file in self.ours[-1:]:
            self.folder.remove(NAME, file)
        for file in self.ours:
            file.listener.close()
        self.ours.clear()

    def kill(self) -> None:
        """Nothing is cleared."""
        for file in self.ours:
            file.listener.close()
        self.ours.clear()

    # The launcher

    def dial(self) -> str:
        """Whose listener a connection by the path reaches."""
        with socket.socket(socket.AF_UNIX) as near:
            try:
                near.connect(str(self.path))
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


def test_what_is_missing_is_left_to_virt_handler_for_a_while(scene: Scene) -> None:
    scene.folder.patience = 3600
    assert not scene.folder.invites(NAME)
    scene.listen()
    assert scene.folder.invites(NAME)


def test_at_the_end_nothing_is_put_where_virt_handler_has_removed_it(scene: Scene) -> None:
    scene.listen()
    scene.place()
    scene.stop()
    scene.leave()
    assert list(scene.path.parent.iterdir()) == []


def test_killed_daemons_successor_takes_the_path_and_gives_virt_handlers_socket_back(scene: Scene) -> None:
    scene.listen()
    scene.place()
    scene.kill()
    assert scene.dial().startswith("nobody")
    scene.place()
    assert scene.dial() == "us"
    scene.leave()
    assert scene.dial() == "virt-handler"


def test_socket_of_ours_has_its_mark_from_its_first_moment(scene: Scene) -> None:
    modes: list[int] = []

    def look() -> None:
        temporary = [path for path in scene.path.parent.iterdir() if path.name.startswith(".migproxy-")]
        modes.extend(path.stat().st_mode for path in temporary)

    scene.folder.before = look
    scene.place()
    assert modes
    assert all(mode & stat.S_ISVTX for mode in modes)


# The model

VIRT_HANDLER = ("listen", "give", "stop", "listen", "give")
"""It prepares, finds the target's ports changed, and prepares anew."""

OURS = {
    "place": (("place",), 5),
    "place-leave": (("place", "leave"), 8),
    "place-place-leave": (("place", "place", "leave"), 9),
    "killed-place-leave": (("place", "kill", "place", "leave"), 10),
}
"""Our steps, and how many moments they have."""


class Schedule:
    """Lets virt-handler take its next steps at given moments, of which each of our changes is one.

    Args:
        moments: At which moment each of its steps is taken; those that never come are taken at the end.
        killed_at: The moment at which we are killed.
    """

    def __init__(self, scene: Scene, moments: tuple[int, ...], killed_at: int | None) -> None:
        self._scene, self._steps, self._killed_at = scene, list(zip(moments, VIRT_HANDLER, strict=True)), killed_at
        self.moment = 0
        self.taken: list[tuple[int, str]] = []

    def __call__(self) -> None:
        while self._steps and self._steps[0][0] <= self.moment:
            self._step()
        self.moment += 1
        if self.moment - 1 == self._killed_at:
            raise Killed

    def finish(self) -> None:
        while self._steps:
            self._step()

    def _step(self) -> None:
        _, name = self._steps.pop(0)
        self.taken.append((self.moment, name))
        # Its own bind fails where somebody has filled the path since it removed it: it tries again a moment later.
        try:
            getattr(self._scene, name)()
        except FileNotFoundError:
            assert name == "give"
            for again in ("listen", "give"):  # as virt-handler does after any error
                getattr(self._scene, again)()


@pytest.mark.parametrize(("ours", "moments"), OURS.values(), ids=OURS)
def test_every_interleaving_leaves_the_path_to_a_listener(tmp_path: Path, ours: tuple[str, ...], moments: int) -> None:
    for chosen in combinations(range(moments + len(VIRT_HANDLER)), len(VIRT_HANDLER)):
        when = tuple(moment - before for before, moment in enumerate(chosen))  # several may be at one moment
        scene = Scene(tmp_path)
        try:
            run(scene, ours, Schedule(scene, when, None))
        finally:
            scene.close()


@pytest.mark.parametrize("killed_at", range(7))
def test_killed_at_any_call_the_successor_mends_it(tmp_path: Path, killed_at: int) -> None:
    moments = 7
    for chosen in combinations(range(moments + len(VIRT_HANDLER)), len(VIRT_HANDLER)):
        when = tuple(moment - before for before, moment in enumerate(chosen))
        scene = Scene(tmp_path)
        schedule = Schedule(scene, when, killed_at)
        try:
            try:
                run(scene, ("place", "leave"), schedule)
            except Killed as killed:
                scene.kill()
                for frame, _ in walk_tb(killed.__traceback__):  # the kernel closes what was just being made
                    if isinstance(listener := frame.f_locals.get("listener"), socket.socket):
                        listener.close()
            else:
                continue
            run(scene, ("place", "leave"), schedule, is_killed=True)
        finally:
            scene.close()


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
        if step == "place" and scene.asked[0]:
            scene.place()  # what came while ours was being placed is told by inotify
            assert scene.dial() == "us"
    scene.folder.before = lambda: None
    schedule.finish()
    may_dial = scene.asked
    check()
    if ours[-1] == "leave":
        assert scene.dial() == "virt-handler"
        assert {path.name for path in scene.path.parent.iterdir()} == {NAME}
