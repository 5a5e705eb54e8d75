"""Where a virt-launcher's sockets are, without trusting the pod they are in.

Whatever runs in the pod may plant symbolic links in its own file system, and an absolute link found below
/proc/PID/root resolves against the node's root (proc(5)). It may mount whatever it sees over any folder, in a user
namespace of its own. And its PID is nobody's for ever: a socket outlives the process that listened. So

- the launcher's process is held by its folder below /proc, which never becomes another process's, and is looked at
  only after that: that it listens on the command socket (SO_PEERPIDFD), and for which VMI (its command line);
- nothing below the launcher's root is opened through a link, or on another mount than the folder of KubeVirt's or
  libvirt's that it is in;
- nothing is looked up in a file system that somebody else answers for (FUSE, NFS): a thread that waits for such an
  answer cannot even be killed (fs/fuse/dev.c, request_wait_answer), and keeps its process from ending;
- sockets are bound and dialled through /proc/self/fd, which also escapes the 108 bytes of a unix socket's address
  (unix(7)).

A disk may still keep any of it waiting: see `launcherthread`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from string import Formatter
from typing import Final, Self

from migproxy.beneath import file_system_of, mount_of, open_beneath
from migproxy.fds import MORE_FILES, OUT_OF_RESOURCES, peer_of
from migproxy.plan import Launcher

COMMAND_SOCKET = "volumes/kubernetes.io~empty-dir/sockets/launcher-sock"
"""The launcher's command socket below the pod's folder of the kubelet (KubeVirt, virt-handler's cmd-client)."""

_SHARED_COMMAND_SOCKET = "kubevirt/sockets/launcher-sock"  # the same one below the launcher's /var/run
_PLACEHOLDERS = {"pid", "uid", "namespace", "name"}
_FOLDER: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_LOCAL: Final = frozenset(
    {
        *("tmpfs", "ramfs", "rootfs", "hugetlbfs", "overlay", "squashfs", "erofs"),
        *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs"),
    }
)
"""File systems for which the kernel answers by itself."""

_NS_GET_USERNS: Final = 0xB701  # linux/nsfs.h: who owns a namespace
_MOST_WORDS: Final = 1 << 16  # bytes of a command line
_SO_PEERPIDFD: Final = 77  # asm-generic/socket.h, Linux 6.5; not among Python's constants


class LauncherError(Exception):
    """A launcher, its folder or its socket is not there, not yet there, or not what it must be."""


class Untrusted(LauncherError):
    """Something in the pod would lead elsewhere; it is refused, and waiting does not mend it."""


@dataclass(frozen=True, slots=True)
class Launchers:
    """Finds the launchers of one node.

    Attributes:
        pattern: Where a launcher's /var/run is, seen from here; may use {pid}, {uid}, {namespace} and {name}.
        pods: The kubelet's pods folder, seen from here; used for {pid} only.

    Raises:
        ValueError: The pattern is malformed, relative, or uses another placeholder.
    """

    pattern: str
    pods: str

    def __post_init__(self) -> None:
        if not self.pattern.startswith("/"):
            raise ValueError(f"{self.pattern!r} is not an absolute path")
        unknown = {field for _, field, _, _ in Formatter().parse(self.pattern) if field is not None} - _PLACEHOLDERS
        if unknown:
            raise ValueError(
                f"{self.pattern!r} uses unknown placeholders {sorted(unknown)}; there are {sorted(_PLACEHOLDERS)}"
            )

    @property
    def folder(self) -> str | None:
        """The folder that has the launchers of a node, and of no other; None where the pattern tells VMIs apart."""
        if "{pid}" in self.pattern:
            return self.pods
        return None if "{" in self.pattern else self.pattern

    def open(self, launcher: Launcher) -> RunDir:
        """Opens the launcher's /var/run.

        Args:
            launcher: Which one.

        Raises:
            LauncherError: It cannot be found or reached (yet); says why, and what to do.
        """
        for value in (launcher.vmi_uid, launcher.namespace, launcher.name):
            if value in (".", "..") or "/" in value or "\0" in value:
                raise LauncherError(f"{value!r} is no name that a path may be made of: mend the VMI's metadata")
        try:
            return self._open(launcher)
        except OSError as error:
            raise _failed(error, self._path(launcher, 0), "see the daemon's limits") from error

    def _open(self, launcher: Launcher) -> RunDir:
        if "{pid}" not in self.pattern:
            return RunDir(self._path(launcher, 0), "")
        with self._command_socket(launcher) as command:
            path = self._path(launcher, command.pid)
            head, marker, below = path.partition(f"/{command.pid}/root/")
            with _Process(f"{head}/{command.pid}" if marker else f"/proc/{command.pid}") as process:
                is_proven = command.is_listened_on_still()
                process.check_vmi(launcher)
                run = process.open_run(below) if marker else RunDir(path, "")
            if not is_proven and not run.is_identity_of(_SHARED_COMMAND_SOCKET, command.identity):
                run.close()
                raise LauncherError(
                    f"{command.path}: who listens there has ended, or process {command.pid} is another one by now: its "
                    f"{run.path}/{_SHARED_COMMAND_SOCKET} is another socket"
                )
            return run

    def _path(self, launcher: Launcher, pid: int) -> str:
        return self.pattern.format(
            pid=pid, uid=launcher.vmi_uid, namespace=launcher.namespace, name=launcher.name
        ).rstrip("/")

    @contextmanager
    def _command_socket(self, launcher: Launcher) -> Iterator[_CommandSocket]:
        """Connects to the command socket of the launcher's one pod here."""
        if not launcher.pods:
            raise LauncherError("status.activePods names no pod on this node: its launcher cannot be found (yet)")
        with RunDir(self.pods, "", one_mount=False) as pods:
            found = [pod for pod in launcher.pods if pods.holds(f"{pod}/{COMMAND_SOCKET}")]
            if not found:
                raise LauncherError(
                    f"no launcher-sock below {self.pods} for pods {', '.join(launcher.pods)}: the launcher is not up "
                    "yet, or --pods-dir is not the kubelet's pods folder"
                )
            if len(found) > 1:
                raise LauncherError(f"several pods have a launcher-sock: {', '.join(found)}; waiting for one to go")
            path = f"{found[0]}/{COMMAND_SOCKET}"
            with pods.find(path) as node, closing(new_unix()) as sock:
                node.connect(sock)
                yield _CommandSocket(sock, node.identity, f"{self.pods}/{path}")


class _CommandSocket:
    """A connection to a launcher's command socket.

    Attributes:
        identity: Device and inode of the socket's file.
        path: For messages only.
        pid: Of the process that made it listen; another's by now, perhaps.
    """

    def __init__(self, sock: socket.socket, identity: tuple[int, int], path: str) -> None:
        self.identity = identity
        self.path = path
        self._sock = sock
        self.pid, _, _ = peer_of(sock)
        if self.pid == 0:
            raise LauncherError(
                f"{path}: the listener's pid is 0, it is outside of this process's pid namespace: "
                "run migproxy in the host's (hostPID: true)"
            )

    def is_listened_on_still(self) -> bool:
        """Whether the process with that PID is the one that made the socket listen; False where none can tell.

        Raises:
            LauncherError: It has ended.
        """
        try:
            pidfd = struct.unpack("i", self._sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]
        except OSError as error:
            if error.errno == errno.ENOPROTOOPT:
                return False
            if error.errno in OUT_OF_RESOURCES:
                raise
            raise self._ended() from error
        try:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            if poller.poll(0):
                raise self._ended()
        finally:
            os.close(pidfd)
        return True

    def _ended(self) -> LauncherError:
        return LauncherError(f"{self.path}: the launcher (pid {self.pid}) has ended, though its socket is still open")


class _Opened:
    """Owns a descriptor.

    Attributes:
        fd: It; -1 once it is closed.
    """

    fd: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed yet."""
        return self.fd >= 0

    def close(self) -> None:
        """Closes it, once."""
        if self.is_open:
            fd, self.fd = self.fd, -1
            os.close(fd)


class _Process(_Opened):
    """A process by its folder below /proc, which leads nowhere once the process has ended; owns its descriptor.

    Attributes:
        fd: The folder.

    Args:
        path: The folder.
        fd: The folder, where it is open already; stays the caller's.

    Raises:
        LauncherError: There is no such process.
    """

    def __init__(self, path: str, fd: int | None = None) -> None:
        self._path = path
        try:
            self.fd = os.open(path, _FOLDER) if fd is None else os.dup(fd)
        except OSError as error:
            raise _failed(error, path, "the launcher has ended") from error

    def copy(self) -> _Process:
        """The same one, with a descriptor of its own."""
        return _Process(self._path, self.fd)

    def check_vmi(self, launcher: Launcher) -> None:
        """Looks for whom it was started.

        Raises:
            Untrusted: For another VMI than the launcher's.
        """
        try:
            with open(os.open("cmdline", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd), "rb") as file:
                words = file.read(_MOST_WORDS).split(b"\0")
        except OSError as error:
            raise _failed(error, f"{self._path}/cmdline", "the launcher has ended") from error
        if not any(words):
            raise LauncherError(f"{self._path}: the launcher is about to end")
        uids = {after for word, after in pairwise(words) if word == b"--uid"}
        uids |= {word.removeprefix(b"--uid=") for word in words if word.startswith(b"--uid=")}
        if uids != {launcher.vmi_uid.encode()}:
            whose = " and ".join(sorted(repr(uid[:64].decode(errors="replace")) for uid in uids)) or "no VMI (no --uid)"
            raise Untrusted(
                f"{self._path} is the launcher of {whose}, not of VMI {launcher.vmi_uid!r}, whose status.activePods "
                "names its pod: refused"
            )

    def mounts(self) -> bytes:
        """What its mountinfo says (proc(5)).

        Raises:
            Untrusted: Not the node, but a user namespace of the pod's owns its mount namespace: an overlay there may
                hide any other file system.
            LauncherError: It has ended.
        """
        try:
            with open(os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd), "rb") as mounts:
                # After that was opened: a process can go into such a namespace, and not come back (setns(2)).
                self._check_mount_namespace()
                return mounts.read()
        except OSError as error:
            raise _failed(error, f"{self._path}/mountinfo", "the launcher has ended") from error

    def _check_mount_namespace(self) -> None:
        mounts = os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            owner = fcntl.ioctl(mounts, _NS_GET_USERNS)
        except PermissionError:  # one above ours
            return
        finally:
            os.close(mounts)
        try:
            is_ours = os.path.samestat(os.stat(owner), os.stat("/proc/self/ns/user"))
        finally:
            os.close(owner)
        if not is_ours:
            raise Untrusted(
                f"{self._path} has mounts of its own making, in a user namespace of the pod's: refused, and hostUsers: "
                "false with it"
            )

    def open_run(self, below: str) -> RunDir:
        """Opens a folder below its root; see RunDir."""
        return RunDir(f"{self._path}/root", below, process=self)


class RunDir(_Opened):
    """A folder whose content is not trusted: the launcher's /var/run; owns its descriptor.

    The folders in it (KubeVirt's and libvirt's, each a volume of the pod) may be on mounts of their own. What is below
    one of those is on its mount, or it is refused: a pod can mount over a folder whatever it sees.

    Attributes:
        fd: The folder, opened with O_PATH.
        path: Its path, for messages only.

    Args:
        trusted: The path up to where trust ends, opened as it is, links included.
        below: The rest of the path, walked without following links.
        process: Whose root it is; that is `trusted` then.
        one_mount: False where what is below may be on any mount.

    Raises:
        LauncherError: It is not there, not readable, or a link stands in the way.
    """

    def __init__(self, trusted: str, below: str, *, process: _Process | None = None, one_mount: bool = True) -> None:
        self._one_mount = one_mount
        self._process: _Process | None = None
        try:
            self.fd = os.open(trusted if process is None else "root", _FOLDER, dir_fd=process.fd if process else None)
        except OSError as error:
            raise _failed(
                error,
                trusted,
                "the launcher is gone or not up yet, or --launcher-run-dir or --pods-dir is wrong",
            ) from error
        self.path = trusted
        try:
            self._process = process and process.copy()
            self._check_local(self.fd, trusted)
            if below:
                inside = self._open(self._usual_run(below), is_folder=True, one_mount=False)
                os.close(self.fd)
                self.fd, self.path = inside, f"{trusted}/{below}"
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the folder."""
        super().close()
        if self._process is not None:
            self._process.close()

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: whether two paths are the same folder."""
        return _identity(self.fd)

    def open_folder(self, relative: str) -> int:
        """Opens a folder below this one, no link followed and no mount entered; the caller closes the descriptor.

        Raises:
            LauncherError: A component is missing, not a folder, a symbolic link, a mount, or not accessible.
        """
        return self._open(relative, is_folder=True, one_mount=self._one_mount)

    def open_node(self, relative: str) -> int:
        """Opens what stands at a path below this folder with O_PATH, be it what it may but a link to elsewhere.

        Raises:
            LauncherError: As `open_folder`.
        """
        return self._open(relative, is_folder=False, one_mount=self._one_mount)

    def is_identity_of(self, relative: str, identity: tuple[int, int]) -> bool:
        """Whether a certain file (device, inode) stands at a path below this folder, on whatever mount."""
        try:
            node = self._open(relative, is_folder=False, one_mount=False)
        except LauncherError:
            return False
        try:
            return _identity(node) == identity
        finally:
            os.close(node)

    def _open(self, relative: str, *, is_folder: bool, one_mount: bool) -> int:
        try:
            return self._descend(relative, is_folder=is_folder, one_mount=one_mount)
        except OSError as error:
            raise _failed(error, f"{self.path}/{relative}", "see the daemon's limits") from error

    def _descend(self, relative: str, *, is_folder: bool, one_mount: bool) -> int:
        components = relative.split("/")
        if not {"", ".", ".."}.isdisjoint(components):
            raise Untrusted(f"{relative!r} would leave {self.path}: refused")
        if not one_mount or len(components) == 1:
            return self._walk(self.fd, components, self.path, is_folder=is_folder, one_mount=False)
        volume = self._walk(self.fd, components[:1], self.path, is_folder=True, one_mount=False)
        try:
            with suppress(OSError):  # the slow way tells what is wrong
                return open_beneath(volume, "/".join(components[1:]), is_folder=is_folder, one_mount=True)
            walked = f"{self.path}/{components[0]}"
            return self._walk(volume, components[1:], walked, is_folder=is_folder, one_mount=True)
        finally:
            os.close(volume)

    def _walk(self, folder: int, components: list[str], walked: str, *, is_folder: bool, one_mount: bool) -> int:
        fd = os.dup(folder)
        for number, component in enumerate(components, 1):
            walked, is_last = f"{walked}/{component}", number == len(components)
            try:
                inside = open_beneath(fd, component, is_folder=is_folder or not is_last, one_mount=one_mount)
                try:
                    if mount_of(inside) != mount_of(fd):
                        self._check_local(inside, walked)
                except BaseException:
                    os.close(inside)
                    raise
            except OSError as error:
                raise _explained(error, component, fd, walked) from error
            finally:
                os.close(fd)
            fd = inside
        return fd

    def _check_local(self, fd: int, path: str) -> None:
        kind = file_system_of(fd, self._process.mounts()) if self._process else None
        if kind is None:
            with open("/proc/self/mountinfo", "rb") as mounts:
                kind = file_system_of(fd, mounts.read())
        if kind not in _LOCAL:
            raise Untrusted(
                f"{path} is on a file system of type {kind or 'unknown'}, which may never answer: refused; "
                f"a launcher's folders are on {', '.join(sorted(_LOCAL))}"
            )

    def _usual_run(self, below: str) -> str:
        """Distributions make /var/run a link to /run (FHS 3.15): walked as /run, which follows nothing."""
        head, _, rest = below.partition("var/run")
        if head or (rest and not rest.startswith("/")):
            return below
        try:
            var = self._open("var", is_folder=True, one_mount=False)
        except LauncherError:
            return below
        try:
            link = open_beneath(var, "run", is_folder=False, one_mount=True)
        except OSError:
            return below
        finally:
            os.close(var)
        try:
            usual = os.readlink("", dir_fd=link) in ("/run", "../run")  # readlinkat(2) of the link itself
        except OSError:
            return below
        finally:
            os.close(link)
        return f"run{rest}" if usual else below

    def holds(self, relative: str) -> bool:
        """Whether anything stands at a path below this folder, reached without following a link."""
        try:
            os.close(self.open_node(relative))
        except LauncherError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        return True

    def find(self, relative: str) -> SocketNode:
        """Finds a unix stream socket below this folder; the caller closes it.

        Raises:
            LauncherError: Nothing is there, or it is no socket.
        """
        return SocketNode(self.open_node(relative), f"{self.path}/{relative}")


class SocketNode(_Opened):
    """The file of a unix stream socket; owns its descriptor.

    Args:
        node: What stands there, opened with O_PATH and no link followed; owned from now on.
        path: For messages only.

    Raises:
        Untrusted: It is no socket, or leads back to a migproxy's source: such a connection would go round without end.
    """

    def __init__(self, node: int, path: str) -> None:
        self.fd = node
        self._path = path
        mode = os.stat(node).st_mode
        if not stat.S_ISSOCK(mode):
            self.close()
            kind = "a symbolic link: refused, never followed" if stat.S_ISLNK(mode) else "not a socket"
            raise Untrusted(f"{path} is {kind}")
        if is_source_socket(mode):
            self.close()
            raise Untrusted(
                f"{path} is not the target launcher's, but a migproxy source's: refused, the connection would go round "
                "and round. Source and target are given one folder: give each host a name of its own (--node-name), or "
                "each launcher its own folder (--launcher-run-dir)"
            )

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the file."""
        return _identity(self.fd)

    def connect(self, sock: socket.socket) -> None:
        """Connects a non-blocking socket to it.

        Raises:
            LauncherError: Nobody listens there, or the queue is full.
        """
        try:
            sock.connect(f"/proc/self/fd/{self.fd}")
        except OSError as error:
            raise LauncherError(
                f"{self._path}: {error.strerror or error}: nobody takes the connection (yet)"
            ) from error


def is_source_socket(mode: int | None) -> bool:
    """Whether a migproxy's source has made a socket file, this daemon's or any other's: all theirs are sticky.

    The sticky bit means nothing on a socket (inode(7)), so that nobody else sets it.

    Args:
        mode: Of the file; None where there is none.
    """
    return mode is not None and stat.S_ISSOCK(mode) and bool(mode & stat.S_ISVTX)


def _identity(fd: int) -> tuple[int, int]:
    status = os.stat(fd)
    return status.st_dev, status.st_ino


def new_unix() -> socket.socket:
    """Makes a non-blocking stream socket to dial a launcher with; the caller owns it."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


def _failed(error: OSError, path: str, remedy: str) -> LauncherError:
    if error.errno in OUT_OF_RESOURCES:
        remedy = MORE_FILES
    return LauncherError(f"{path}: {error.strerror}: {remedy}")


def _explained(error: OSError, component: str, folder: int, path: str) -> LauncherError:
    if error.errno == errno.EXDEV:
        return Untrusted(f"{path}: something is mounted there: refused, as the pod may mount whatever it sees")
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        with suppress(OSError):
            node = open_beneath(folder, component, is_folder=False, one_mount=True)
            try:
                if stat.S_ISLNK(os.stat(node).st_mode):
                    return Untrusted(f"{path} is a symbolic link: refused, never followed")
            finally:
                os.close(node)
    return LauncherError(f"{path}: {error.strerror}")
