"""What an unprivileged user has planted in a folder that all may write to is refused, and never followed or changed."""

import asyncio
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from migproxy import control, devcerts
from migproxy.bench import command as bench
from migproxy.bench.stage import BenchError
from migproxy.lifeline import Lifeline, LifelineError, is_locked
from migproxy.relay.client import RelayClient
from migproxy.relay.process import Relay, RelayError
from migproxy.safefiles import Planted, bind, make_folder, write_file

pytestmark = pytest.mark.tier("gate")

NOBODY = 65534
PRECIOUS = "a file of root's"


def serve(path: Path) -> None:
    async def once() -> None:
        async with control.serve(str(path), dict):
            pass

    asyncio.run(once())


@dataclass(frozen=True)
class Use:
    """What makes something in such a folder.

    Attributes:
        name: What is planted there.
        make: Makes it, where the argument is the planted path.
        error: What its user is told by.
    """

    name: str
    make: Callable[[Path], object]
    error: type[Exception]


USES = {
    "lock of daemon and failsafe": Use("c.daemon.lock", lambda path: Lifeline(str(path)), LifelineError),
    "control socket": Use("c.sock", serve, control.ControlError),
    "relay's socket": Use("relay.sock", lambda path: Relay(str(path)), RelayError),
    "relay's lock": Use("relay.sock.lock", lambda path: Relay(str(path.with_suffix(""))), RelayError),
    "KubeVirt's CA": Use("kubevirt-ca.crt", lambda path: write_file(str(path), "text"), Planted),
    "benchmark's results": Use("r.json", lambda path: bench._write(str(path), "text", print), BenchError),
    "certificates' folder": Use("tls", lambda path: devcerts.make(str(path), 1), OSError),
    "certificates' key": Use("ca.key", lambda path: devcerts.make(str(path.parent), 1), OSError),
}


def link(path: Path, precious: Path) -> None:
    path.symlink_to(precious)


def hard_link(path: Path, precious: Path) -> None:
    path.hardlink_to(precious)


def fifo(path: Path, _: Path) -> None:
    os.mkfifo(path, 0o666)


def folder(path: Path, _: Path) -> None:
    path.mkdir()


def file(path: Path, _: Path) -> None:
    path.write_text("a stranger's")
    path.chmod(0o666)


def unix_socket(path: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    path.chmod(0o666)


PLANTS = (link, hard_link, fifo, folder, file, unix_socket)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that everybody may write to, as /tmp."""
    made = tmp_path / "shared"
    made.mkdir()
    made.chmod(0o1777)
    return made


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.root
@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_what_a_stranger_has_planted_is_refused_and_left_alone(
    use: Use, plant: Callable[[Path, Path], None], shared: Path, tmp_path: Path
) -> None:
    precious, planted = tmp_path / "precious", shared / use.name
    precious.write_text(PRECIOUS)
    precious.chmod(0o640)
    plant(planted, precious)
    if plant is not hard_link:
        os.lchown(planted, NOBODY, NOBODY)
    before = planted.lstat()
    with pytest.raises(use.error) as refused:
        use.make(planted)
    assert planted.name in f"{refused.value} {getattr(refused.value, 'filename', '')}"
    after = planted.lstat()
    assert (after.st_ino, after.st_mode, after.st_uid, after.st_mtime) == (
        before.st_ino,
        before.st_mode,
        before.st_uid,
        before.st_mtime,
    )
    assert (precious.read_text(), mode(precious), precious.stat().st_uid) == (PRECIOUS, 0o640, os.geteuid())


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (link, "a symbolic link stands there, and is not followed: remove it, or give another path"),
        (hard_link, "a hard link to another file stands there: remove it, or give another path"),
        (fifo, "what stands there is no regular file: remove it, or give another path"),
    ],
)
def test_the_error_says_what_stands_there_and_what_to_do(
    plant: Callable[[Path, Path], None], told: str, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text(PRECIOUS)
    plant(shared / "c.daemon.lock", tmp_path / "precious")
    with pytest.raises(LifelineError) as refused:
        Lifeline(str(shared / "c.daemon.lock"))
    assert str(refused.value) == f"{shared / 'c.daemon.lock'}: {told} as --control-socket"


@pytest.mark.root
def test_a_folder_that_a_stranger_made_or_leads_elsewhere_is_refused(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (shared / "link").symlink_to(tmp_path / "elsewhere")
    (shared / "made").mkdir()
    (shared / "made/below").mkdir()
    os.lchown(shared / "made/below", NOBODY, NOBODY)
    for name in ("link", "made"):
        os.lchown(shared / name, NOBODY, NOBODY)
        for inside in (shared / name, shared / name / "below"):
            with pytest.raises(LifelineError, match=f"{shared / name} belongs to user {NOBODY}: remove it"):
                Lifeline(str(inside / "c.daemon.lock"))
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_folder_that_another_process_makes_in_the_same_moment_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir_of_two(path: str, mkdir: Callable[[str], None] = os.mkdir) -> None:
        mkdir(path)
        mkdir(path)

    monkeypatch.setattr(os, "mkdir", mkdir_of_two)
    make_folder(str(tmp_path / "one" / "two"))
    assert (tmp_path / "one" / "two").is_dir()


@pytest.mark.root
def test_a_folder_that_a_stranger_makes_in_the_same_moment_is_refused(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir_of_a_stranger(path: str, mkdir: Callable[[str], None] = os.mkdir) -> None:
        mkdir(path)
        os.chown(path, NOBODY, NOBODY)
        raise FileExistsError

    monkeypatch.setattr(os, "mkdir", mkdir_of_a_stranger)
    with pytest.raises(Planted, match=f"belongs to user {NOBODY}"):
        make_folder(str(shared / "one"))


@pytest.mark.root
def test_a_folder_of_another_user_that_nobody_else_writes_to_is_taken(tmp_path: Path) -> None:
    """The administrator has named it: /home/user, say."""
    (tmp_path / "home").mkdir(0o755)
    os.chown(tmp_path / "home", NOBODY, NOBODY)
    serve(tmp_path / "home" / "c.sock")
    write_file(str(tmp_path / "home" / "r.json"), "text")


@pytest.mark.root
def test_a_strangers_lock_does_not_pass_for_a_running_failsafe(shared: Path) -> None:
    with closing(Lifeline(str(shared / "c.failsafe.lock"))) as lifeline, lifeline.taken():
        assert is_locked(str(shared / "c.failsafe.lock"))
        os.chown(shared / "c.failsafe.lock", NOBODY, NOBODY)
        assert not is_locked(str(shared / "c.failsafe.lock"))


def test_a_fifo_is_no_lock_and_nobody_waits_for_its_writer(shared: Path) -> None:
    os.mkfifo(shared / "c.failsafe.lock")
    assert not is_locked(str(shared / "c.failsafe.lock"))


@pytest.mark.root
async def test_a_strangers_relay_gets_nothing_from_the_daemon_that_starts_its_own(shared: Path) -> None:
    path = shared / "c.relay.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.bind(str(path))
        os.seteuid(NOBODY)  # the kernel tells who listened (unix(7), SO_PEERCRED)
        try:
            stranger.listen()
        finally:
            os.seteuid(0)
        stranger.setblocking(False)
        client = RelayClient(str(path), starts=True)
        opening = asyncio.create_task(client.open())
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):
            connection, _ = await loop.sock_accept(stranger)
            with connection:
                assert await loop.sock_recv(connection, 1) == b"", "and nothing was said"
        assert f"user {NOBODY} listens there: end that process and remove its socket" in (client.problem or "")
        opening.cancel()
        client.close()


@pytest.mark.parametrize("mask", [0, 0o077])
def test_the_umask_makes_nothing_wider_or_narrower_than_documented(mask: int, tmp_path: Path) -> None:
    made = tmp_path / "one" / "two"
    with umask(mask), socket.socket(socket.AF_UNIX) as control_socket, socket.socket(socket.AF_UNIX) as relay_socket:
        bind(control_socket, str(made / "c.sock"), 0o660)
        bind(relay_socket, str(made / "relay.sock"), 0o600)
        Lifeline(str(made / "c.daemon.lock")).close()
        make_folder(str(made / "three" / "four"))
    modes = {path.name: mode(path) for path in (made.parent, made, *made.rglob("*"))}
    assert modes == {
        **dict.fromkeys(("one", "two", "three", "four"), 0o755),
        "c.sock": 0o660,
        "relay.sock": 0o600,
        "c.daemon.lock": 0o600,
    }


def test_files_of_an_unmasked_daemon_are_its_own_to_write(tmp_path: Path) -> None:
    with umask(0):
        write_file(str(tmp_path / "kubevirt-ca.crt"), "text")
        devcerts.make(str(tmp_path / "tls"), 1)
    assert mode(tmp_path / "kubevirt-ca.crt") == 0o644
    keys = {mode(path) for path in (tmp_path / "tls").rglob("*.key")}
    assert keys == {0o600}
    assert {mode(path) for path in (tmp_path / "tls").rglob("*") if path.is_dir()} == {0o755}


def test_a_file_is_replaced_as_a_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "kubevirt-ca.crt"
    write_file(str(path), "before")
    with path.open() as reader:
        write_file(str(path), "after")
        assert reader.read() == "before"
    assert path.read_text() == "after"
    assert [*tmp_path.iterdir()] == [path]


def test_the_relay_names_its_lock_where_that_is_planted(shared: Path) -> None:
    os.mkfifo(shared / "relay.sock.lock")
    with pytest.raises(RelayError, match=r"relay\.sock\.lock: what stands there is no regular file: remove it"):
        Relay(str(shared / "relay.sock"))
