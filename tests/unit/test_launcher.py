"""Finding launchers: the pid of the command socket's listener, and folders in which nothing planted is followed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from migproxy.launcher import COMMAND_SOCKET, LauncherError, Launchers, RunDir, Untrusted
from migproxy.plan import Launcher

pytestmark = pytest.mark.tier("gate")

POD, OTHER_POD = "aaaaaaaa-0000-4000-8000-000000000001", "bbbbbbbb-0000-4000-8000-000000000002"


def launcher(*pods: str, uid: str = "uid", namespace: str = "default", name: str = "vm") -> Launcher:
    return Launcher(namespace=namespace, name=name, vmi_uid=uid, pods=pods)


@pytest.fixture(autouse=True)
def _no_descriptor_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.fixture
def listeners() -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    yield opened
    for sock in opened:
        sock.close()


def listen(path: Path, listeners: list[socket.socket], backlog: int = 5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    listeners.append(sock)
    folder = os.open(path.parent, os.O_PATH)
    sock.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)
    sock.listen(backlog)


@pytest.mark.parametrize("link", ["absolute", "relative"])
@pytest.mark.parametrize("planted", ["kubevirt", "kubevirt/migrationproxy", "kubevirt/migrationproxy/x.sock"])
def test_a_planted_link_is_refused_at_each_component(
    tmp_path: Path, listeners: list[socket.socket], planted: str, link: str
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    listen(elsewhere / "kubevirt/migrationproxy/x.sock", listeners)
    at = run / planted
    at.parent.mkdir(parents=True)
    goal = elsewhere / planted
    at.symlink_to(goal if link == "absolute" else os.path.relpath(goal, at.parent))
    with RunDir(str(run), "") as folder:
        with pytest.raises(Untrusted, match="symbolic link: refused"):
            folder.connect("kubevirt/migrationproxy/x.sock")
        if planted != "kubevirt/migrationproxy/x.sock":
            with pytest.raises(Untrusted, match="symbolic link: refused"):
                folder.open_folder("kubevirt/migrationproxy")


@pytest.mark.parametrize("link", ["absolute", "relative"])
@pytest.mark.parametrize("planted", ["var", "var/run"])
def test_a_planted_link_below_the_launchers_root_is_refused(tmp_path: Path, planted: str, link: str) -> None:
    goal = tmp_path / "elsewhere"
    (goal / "run").mkdir(parents=True)
    at = tmp_path / "root" / planted
    at.parent.mkdir(parents=True)
    at.symlink_to(goal if link == "absolute" else os.path.relpath(goal, at.parent))
    with pytest.raises(Untrusted, match="symbolic link: refused"):
        RunDir(str(tmp_path / "root"), "var/run")


@pytest.mark.parametrize("usual", ["/run", "../run"])
def test_the_distributions_own_link_from_var_run_to_run_is_walked_inside_the_root(tmp_path: Path, usual: str) -> None:
    (tmp_path / "var").mkdir()
    (tmp_path / "run/kubevirt").mkdir(parents=True)
    (tmp_path / "var/run").symlink_to(usual)
    with RunDir(str(tmp_path), "var/run") as run:
        assert run.holds("kubevirt")
        assert run.identity == ((status := (tmp_path / "run").stat()).st_dev, status.st_ino)


def test_even_then_run_itself_must_not_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "var").mkdir()
    (tmp_path / "var/run").symlink_to("/run")
    (tmp_path / "run").symlink_to("/etc")
    with pytest.raises(Untrusted, match="symbolic link"):
        RunDir(str(tmp_path), "var/run")


@pytest.mark.parametrize("path", ["../x.sock", "kubevirt/../../x.sock", "/x.sock", ".."])
def test_a_path_that_would_climb_out_is_refused(tmp_path: Path, listeners: list[socket.socket], path: str) -> None:
    (tmp_path / "run/kubevirt").mkdir(parents=True)
    listen(tmp_path / "x.sock", listeners)
    with RunDir(str(tmp_path / "run"), "") as run, pytest.raises(Untrusted, match="would leave"):
        run.connect(path)


def test_what_is_no_socket_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.sock").write_text("a file")
    with RunDir(str(tmp_path), "") as run, pytest.raises(Untrusted, match="not a socket"):
        run.connect("x.sock")


def test_a_socket_without_a_listener_is_an_error_that_waiting_may_mend(
    tmp_path: Path, listeners: list[socket.socket]
) -> None:
    listen(tmp_path / "x.sock", listeners)
    listeners[0].close()
    with RunDir(str(tmp_path), "") as run, pytest.raises(LauncherError, match="refused") as refused:
        run.connect("x.sock")
    assert not isinstance(refused.value, Untrusted)


def test_a_launcher_that_accepts_nothing_does_not_block_us(tmp_path: Path, listeners: list[socket.socket]) -> None:
    listen(tmp_path / "x.sock", listeners, backlog=0)
    with RunDir(str(tmp_path), "") as run:
        run.connect("x.sock").close()
        with pytest.raises(LauncherError, match="temporarily unavailable"):
            run.connect("x.sock")


def test_a_path_longer_than_a_unix_address_is_reached(tmp_path: Path, listeners: list[socket.socket]) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    listen(deep / ("s" * 60), listeners)
    with RunDir(str(deep), "") as run:
        run.connect("s" * 60).close()


def test_a_pattern_without_pid_needs_no_command_socket(tmp_path: Path) -> None:
    (tmp_path / "ns/vm/uid").mkdir(parents=True)
    launchers = Launchers(str(tmp_path / "{namespace}/{name}/{uid}"), "/nowhere")
    with launchers.open(launcher(uid="uid", namespace="ns", name="vm")) as run:
        assert run.path == str(tmp_path / "ns/vm/uid")


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\0b"])
def test_a_name_that_would_leave_the_pattern_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(LauncherError, match="no name that a path may be made of"):
        Launchers(str(tmp_path / "{name}"), "/nowhere").open(launcher(name=name))


@pytest.mark.parametrize(("pattern", "why"), [("run", "absolute"), ("/{host}/run", "unknown placeholders")])
def test_a_malformed_pattern_is_an_error_at_start(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Launchers(pattern, "/")


class TestPid:
    """The default pattern: the launcher is whoever listens on the pod's command socket; here, this process."""

    @pytest.fixture
    def launchers(self, tmp_path: Path) -> Launchers:
        return Launchers("/proc/{pid}/root/proc", str(tmp_path))

    def test_the_listeners_root_is_opened(
        self, tmp_path: Path, listeners: list[socket.socket], launchers: Launchers
    ) -> None:
        listen(tmp_path / POD / COMMAND_SOCKET, listeners)
        with launchers.open(launcher(POD, OTHER_POD)) as run:
            assert run.path == f"/proc/{os.getpid()}/root/proc"
            assert run.holds("self") or run.holds("version")

    def test_no_pod_is_told_apart_from_no_socket(self, tmp_path: Path, launchers: Launchers) -> None:
        with pytest.raises(LauncherError, match="activePods names no pod on this node"):
            launchers.open(launcher())
        with pytest.raises(LauncherError, match=f"no launcher-sock below {tmp_path} for pods {POD}"):
            launchers.open(launcher(POD))

    def test_two_candidate_pods_are_waited_for(
        self, tmp_path: Path, listeners: list[socket.socket], launchers: Launchers
    ) -> None:
        for pod in (POD, OTHER_POD):
            listen(tmp_path / pod / COMMAND_SOCKET, listeners)
        with pytest.raises(LauncherError, match="several pods have a launcher-sock"):
            launchers.open(launcher(POD, OTHER_POD))

    def test_a_command_socket_that_is_a_link_is_refused(
        self, tmp_path: Path, listeners: list[socket.socket], launchers: Launchers
    ) -> None:
        listen(tmp_path / "somebody-elses", listeners)
        planted = tmp_path / POD / COMMAND_SOCKET
        planted.parent.mkdir(parents=True)
        planted.symlink_to(tmp_path / "somebody-elses")
        with pytest.raises(Untrusted, match="symbolic link"):
            launchers.open(launcher(POD))

    def test_a_missing_pods_folder_names_the_option(self, launchers: Launchers, tmp_path: Path) -> None:
        with pytest.raises(LauncherError, match="--pods-dir"):
            Launchers(launchers.pattern, str(tmp_path / "gone")).open(launcher(POD))
