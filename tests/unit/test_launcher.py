"""Finding launchers: the pid of the command socket's listener, and folders in which nothing planted is followed."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from migproxy.beneath import file_system_of, mount_of
from migproxy.launcher import COMMAND_SOCKET, LauncherError, Launchers, RunDir, Untrusted, _Process, new_unix
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


def dial(run: RunDir, relative: str) -> socket.socket:
    with run.find(relative) as node, ExitStack() as stack:
        sock = stack.enter_context(new_unix())
        node.connect(sock)
        stack.pop_all()
        return sock


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
            dial(folder, "kubevirt/migrationproxy/x.sock")
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
        dial(run, path)


def test_what_is_no_socket_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.sock").write_text("a file")
    with RunDir(str(tmp_path), "") as run, pytest.raises(Untrusted, match="not a socket"):
        dial(run, "x.sock")


def test_a_socket_without_a_listener_is_an_error_that_waiting_may_mend(
    tmp_path: Path, listeners: list[socket.socket]
) -> None:
    listen(tmp_path / "x.sock", listeners)
    listeners[0].close()
    with RunDir(str(tmp_path), "") as run, pytest.raises(LauncherError, match="refused") as refused:
        dial(run, "x.sock")
    assert not isinstance(refused.value, Untrusted)


def test_a_launcher_that_accepts_nothing_does_not_block_us(tmp_path: Path, listeners: list[socket.socket]) -> None:
    listen(tmp_path / "x.sock", listeners, backlog=0)
    with RunDir(str(tmp_path), "") as run:
        dial(run, "x.sock").close()
        with pytest.raises(LauncherError, match="temporarily unavailable"):
            dial(run, "x.sock")


def test_a_path_longer_than_a_unix_address_is_reached(tmp_path: Path, listeners: list[socket.socket]) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    listen(deep / ("s" * 60), listeners)
    with RunDir(str(deep), "") as run:
        dial(run, "s" * 60).close()


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


class TestMounts:
    """A pod can mount what it sees over any folder, in a user namespace of its own."""

    @pytest.fixture(autouse=True, params=["openat2", "each component"])
    def _kernel(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param != "openat2":
            monkeypatch.setattr("migproxy.beneath._OPENAT2", 9999)  # ENOSYS

    @pytest.fixture
    def mount(self) -> Iterator[Callable[[Path, Path], None]]:
        mounted = []

        def mount(what: Path, where: Path) -> None:
            subprocess.run(["mount", "--bind", what, where], check=True)
            mounted.append(where)

        yield mount
        for where in reversed(mounted):
            subprocess.run(["umount", where], check=True)

    @pytest.mark.parametrize("where", ["kubevirt/migrationproxy", "kubevirt/migrationproxy/x.sock"])
    def test_nothing_below_kubevirts_folder_is_on_another_mount(
        self, tmp_path: Path, listeners: list[socket.socket], mount: Callable[[Path, Path], None], where: str
    ) -> None:
        run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
        listen(elsewhere / "kubevirt/migrationproxy/x.sock", listeners)
        listen(run / "kubevirt/migrationproxy/x.sock", listeners)
        mount(elsewhere / where, run / where)
        with RunDir(str(run), "") as folder:
            with pytest.raises(Untrusted, match=f"{where}: something is mounted there: refused"):
                folder.find("kubevirt/migrationproxy/x.sock")
            with pytest.raises(Untrusted, match="something is mounted there"):
                folder.open_node(where)

    def test_the_folders_that_are_the_pods_volumes_may_be_mounts(
        self, tmp_path: Path, listeners: list[socket.socket], mount: Callable[[Path, Path], None]
    ) -> None:
        run, volume = tmp_path / "root/var/run", tmp_path / "volume"
        listen(volume / "migrationproxy/x.sock", listeners)
        (tmp_path / "root/run/kubevirt").mkdir(parents=True)
        run.mkdir(parents=True)
        mount(tmp_path / "root/run", run)
        mount(volume, run / "kubevirt")
        with RunDir(str(tmp_path / "root"), "var/run") as folder:
            dial(folder, "kubevirt/migrationproxy/x.sock").close()


COMMAND = """
import ctypes, os, socket, sys
folder = os.open(sys.argv[1], os.O_PATH)
listener = socket.socket(socket.AF_UNIX)
listener.bind(f"/proc/self/fd/{folder}/launcher-sock")
listener.listen()
if "mounts" in sys.argv:
    assert not ctypes.CDLL(None).unshare(0x10020000), "user_namespaces(7)"
if "outlived" in sys.argv:
    reader, writer = os.pipe()
    if not os.fork():
        os.close(writer)
        os.read(reader, 1)  # until its parent has ended
        print(flush=True)
        sys.stdin.read()
else:
    print(flush=True)
    sys.stdin.read()
"""
"""Listens on a command socket, as virt-launcher does; or its child does, which has outlived it."""


def limit_that_leaves(few: int) -> int:
    """The limit of open files that leaves a few to be opened."""
    number = 0
    while few:
        try:
            os.fstat(number)
        except OSError:
            few -= 1
        number += 1
    return number


class TestPid:
    """The default pattern: the launcher is the process that listens on the pod's command socket."""

    @pytest.fixture
    def launchers(self, tmp_path: Path) -> Launchers:
        (tmp_path / "var/run").mkdir(parents=True)
        return Launchers(f"/proc/{{pid}}/root{tmp_path}/var/run", str(tmp_path))

    @pytest.fixture
    def start(self, tmp_path: Path) -> Iterator[Callable[..., int]]:
        """Starts a launcher in POD with these words on its command line; returns its PID."""
        with ExitStack() as stack:

            def start(*words: str) -> int:
                folder = (tmp_path / POD / COMMAND_SOCKET).parent
                folder.mkdir(parents=True)
                command = [sys.executable, "-c", COMMAND, str(folder), *words]
                process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
                assert process.stdout
                process.stdout.readline()
                if "outlived" in words:
                    process.wait()
                return process.pid

            yield start

    @pytest.mark.parametrize("words", [("--uid", "uid"), ("--name", "vm", "--uid=uid", "--qemu-timeout", "300s")])
    def test_the_listeners_root_is_opened(
        self, tmp_path: Path, launchers: Launchers, start: Callable[..., int], words: tuple[str, ...]
    ) -> None:
        pid = start(*words)
        with launchers.open(launcher(POD, OTHER_POD)) as run:
            assert run.path == f"/proc/{pid}/root{tmp_path}/var/run"
            assert os.path.samestat(os.stat(run.fd), os.stat(tmp_path / "var/run"))

    @pytest.mark.parametrize(
        ("words", "whose"),
        [
            (("--uid", "another"), "'another'"),
            ((), r"no VMI \(no --uid\)"),
            (("--uid", "another", "--uid", "uid"), "'another' and 'uid'"),
            (("--name", "uid", "uid", "--uid"), "''"),
            (("--uid", "uid2"), "'uid2'"),
        ],
    )
    def test_another_vmis_launcher_is_refused_and_both_are_named(
        self, launchers: Launchers, start: Callable[..., int], words: tuple[str, ...], whose: str
    ) -> None:
        pid = start(*words)
        with pytest.raises(Untrusted, match=f"/proc/{pid} is the launcher of {whose}.*, not of VMI 'uid'"):
            launchers.open(launcher(POD))

    def test_launcher_that_has_made_itself_root_of_its_own_mounts_is_refused(
        self, launchers: Launchers, start: Callable[..., int]
    ) -> None:
        pid = start("mounts", "--uid", "uid")
        with pytest.raises(Untrusted, match=f"/proc/{pid} has mounts of its own making"):
            launchers.open(launcher(POD))

    def test_file_system_that_may_never_answer_is_refused(self, tmp_path: Path, start: Callable[..., int]) -> None:
        pid = start("--uid", "uid")
        with pytest.raises(Untrusted, match=f"/proc/{pid}/root/proc is on a file system of type proc"):
            Launchers("/proc/{pid}/root/proc", str(tmp_path)).open(launcher(POD))

    @pytest.mark.parametrize("line", ["a\x0b-\x0btmpfs\x0bb", "a\r{id}\x0b-\x0btmpfs\x0bb", "- tmpfs x"])
    def test_name_of_a_folder_does_not_pass_for_a_file_systems_type(self, tmp_path: Path, line: str) -> None:
        fd = os.open("/proc", os.O_PATH)
        name = line.format(id=mount_of(fd))
        folder = tmp_path / name
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
        try:
            assert file_system_of(fd, Path("/proc/self/mountinfo").read_bytes()) == "proc"
        finally:
            os.close(fd)
            subprocess.run(["umount", folder], check=True)

    def test_socket_that_has_outlived_its_process_leads_nowhere(
        self, launchers: Launchers, start: Callable[..., int]
    ) -> None:
        pid = start("outlived", "--uid", "uid")
        with pytest.raises(LauncherError, match=f"/proc/{pid}: No such file.*ended"):
            launchers.open(launcher(POD))

    @pytest.mark.parametrize("kernel", ["6.5", "before"])
    def test_process_that_has_got_the_pid_of_one_that_has_ended_is_not_taken_for_it(
        self, launchers: Launchers, start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, kernel: str
    ) -> None:
        start("outlived", "--uid", "uid")
        if kernel == "before":
            monkeypatch.setattr("migproxy.launcher._SO_PEERPIDFD", 9999)  # is answered with ENOPROTOOPT
        command = [sys.executable, "-c", "print(flush=True); input()", "--uid", "uid"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout
            other.stdout.readline()
            monkeypatch.setattr("migproxy.launcher.peer_of", lambda _: (other.pid, 0, 0))
            with pytest.raises(LauncherError, match="has ended"):
                launchers.open(launcher(POD))
            other.communicate(b"\n")

    def test_before_linux_6_5_the_root_is_right_that_has_the_very_same_command_socket(
        self, tmp_path: Path, start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("migproxy.launcher._SO_PEERPIDFD", 9999)
        start("--uid", "uid")
        run = tmp_path / "run"
        (run / "kubevirt/sockets").mkdir(parents=True)
        launchers = Launchers(f"/proc/{{pid}}/root{run}", str(tmp_path))
        with pytest.raises(LauncherError, match="is another socket"):
            launchers.open(launcher(POD))
        (run / "kubevirt/sockets/launcher-sock").hardlink_to(tmp_path / POD / COMMAND_SOCKET)
        launchers.open(launcher(POD)).close()

    def test_one_that_goes_into_such_a_namespace_after_it_was_found_is_refused(
        self, start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with (
            _Process("/proc/self") as before,
            before.open_run("") as run,
            _Process(f"/proc/{start('mounts')}") as after,
            monkeypatch.context() as changed,
        ):
            changed.setattr(run._process, "mounts", after.mounts)
            with pytest.raises(Untrusted, match="has mounts of its own making"):
                run.open_folder("proc")

    def test_no_descriptor_is_lost_where_few_are_left(
        self, tmp_path: Path, launchers: Launchers, start: Callable[..., int]
    ) -> None:
        start("--uid", "uid")
        (tmp_path / "var/run/kubevirt/migrationproxy").mkdir(parents=True)
        before, (soft, hard) = os.listdir("/proc/self/fd"), resource.getrlimit(resource.RLIMIT_NOFILE)
        reached, told = 0, set()
        for few in range(20):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit_that_leaves(few), hard))
            try:
                with launchers.open(launcher(POD)) as run:
                    os.close(run.open_folder("kubevirt/migrationproxy"))
                    reached += 1
            except LauncherError as error:
                told.add("Too many open files" in str(error))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert len(os.listdir("/proc/self/fd")) == len(before), few
        assert 0 < reached < 20
        assert told == {True}

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
