"""Where a virt-launcher's sockets are, without trusting the pod they are in.

Whatever runs in the pod may plant symbolic links in its own file system, and an absolute link found below
/proc/PID/root resolves against the node's root (proc(5)). So nothing below the launcher's root is ever opened by
path: each component is opened from the descriptor of the one before with O_NOFOLLOW, and sockets are bound and
dialled through /proc/self/fd, which also escapes the 108 bytes of a unix socket's address (unix(7)).
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from string import Formatter

from migproxy.plan import Launcher

COMMAND_SOCKET = "volumes/kubernetes.io~empty-dir/sockets/launcher-sock"
"""The launcher's command socket below the pod's folder of the kubelet (KubeVirt, virt-handler's cmd-client)."""

_PLACEHOLDERS = {"pid", "uid", "namespace", "name"}
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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
        if "{pid}" not in self.pattern:
            return RunDir(self._path(launcher, 0), "")
        with self._command_socket(launcher) as (pid, hung_up):
            root, marker, below = self._path(launcher, pid).partition(f"/{pid}/root/")
            run = RunDir(root + marker.rstrip("/"), below)
            if hung_up():  # and the pid may be another process's by now
                run.close()
                raise LauncherError(f"the launcher (pid {pid}) ended while its folder was being opened")
            return run

    def _path(self, launcher: Launcher, pid: int) -> str:
        return self.pattern.format(
            pid=pid, uid=launcher.vmi_uid, namespace=launcher.namespace, name=launcher.name
        ).rstrip("/")

    @contextmanager
    def _command_socket(self, launcher: Launcher) -> Iterator[tuple[int, Callable[[], bool]]]:
        """Connects to the command socket of the launcher's one pod here, and tells the pid of who listens on it."""
        if not launcher.pods:
            raise LauncherError("status.activePods names no pod on this node: its launcher cannot be found (yet)")
        with RunDir(self.pods, "") as pods:
            found = [pod for pod in launcher.pods if pods.holds(f"{pod}/{COMMAND_SOCKET}")]
            if not found:
                raise LauncherError(
                    f"no launcher-sock below {self.pods} for pods {', '.join(launcher.pods)}: the launcher is not up "
                    "yet, or --pods-dir is not the kubelet's pods folder"
                )
            if len(found) > 1:
                raise LauncherError(f"several pods have a launcher-sock: {', '.join(found)}; waiting for one to go")
            path = f"{self.pods}/{found[0]}/{COMMAND_SOCKET}"
            with closing(pods.connect(f"{found[0]}/{COMMAND_SOCKET}")) as sock:
                pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                if pid == 0:
                    raise LauncherError(
                        f"{path}: the listener's pid is 0, it is outside of this process's pid namespace: "
                        "run migproxy in the host's (hostPID: true)"
                    )
                poller = select.poll()
                poller.register(sock, 0)
                yield pid, lambda: bool(poller.poll(0))


class RunDir:
    """A folder whose content is not trusted: the launcher's /var/run; owns its descriptor.

    Attributes:
        fd: The folder, opened with O_PATH.
        path: Its path, for messages only.

    Args:
        trusted: The path up to where trust ends, opened as it is, links included.
        below: The rest of the path, walked without following links.

    Raises:
        LauncherError: It is not there, not readable, or a link stands in the way.
    """

    def __init__(self, trusted: str, below: str) -> None:
        try:
            self.fd = os.open(trusted, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise LauncherError(
                f"{trusted}: {error.strerror}: the launcher is gone or not up yet, or --launcher-run-dir or "
                "--pods-dir is wrong"
            ) from error
        self.path = trusted
        if below:
            try:
                inside = self.open_folder(_usual_run(self.fd, below))
            finally:
                os.close(self.fd)
            self.fd, self.path = inside, f"{trusted}/{below}"

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the folder."""
        os.close(self.fd)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: whether two paths are the same folder."""
        status = os.stat(self.fd)
        return status.st_dev, status.st_ino

    def open_folder(self, relative: str) -> int:
        """Opens a folder below this one, no link followed; the caller closes the descriptor.

        Raises:
            LauncherError: A component is missing, not a folder, a symbolic link, or not accessible.
        """
        components = self._components(relative)
        fd = os.dup(self.fd)
        walked = self.path
        for component in components:
            walked = f"{walked}/{component}"
            try:
                inside = os.open(component, _DIRECTORY, dir_fd=fd)
            except OSError as error:
                raise _explained(error, component, fd, walked) from error
            finally:
                os.close(fd)
            fd = inside
        return fd

    def open_node(self, relative: str) -> int:
        """Opens what stands at a path below this folder with O_PATH, be it what it may but a link to elsewhere.

        Raises:
            LauncherError: As `open_folder`.
        """
        *parents, name = self._components(relative)
        folder = self.open_folder("/".join(parents)) if parents else os.dup(self.fd)
        try:
            return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except OSError as error:
            raise _explained(error, name, folder, f"{self.path}/{relative}") from error
        finally:
            os.close(folder)

    def _components(self, relative: str) -> list[str]:
        components = relative.split("/")
        if not {"", ".", ".."}.isdisjoint(components):
            raise Untrusted(f"{relative!r} would leave {self.path}: refused")
        return components

    def holds(self, relative: str) -> bool:
        """Whether anything stands at a path below this folder, reached without following a link."""
        try:
            os.close(self.open_node(relative))
        except LauncherError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        return True

    def connect(self, relative: str) -> socket.socket:
        """Connects to a unix stream socket below this folder, without blocking.

        Returns:
            The connected, non-blocking socket; the caller closes it.

        Raises:
            LauncherError: See `find`.
        """
        with self.find(relative) as connect:
            sock = new_unix()
            try:
                connect(sock)
            except LauncherError:
                sock.close()
                raise
            return sock

    @contextmanager
    def find(self, relative: str) -> Iterator[Callable[[socket.socket], None]]:
        """Finds a unix stream socket below this folder.

        Returns:
            What connects a socket of the caller's to it, without blocking, within the context; raises LauncherError
            where nobody listens, or its queue is full.

        Raises:
            LauncherError: Nothing is there, or it is no socket.
        """
        with connecting(self.open_node(relative), f"{self.path}/{relative}") as connect:
            yield connect


@contextmanager
def connecting(node: int, path: str) -> Iterator[Callable[[socket.socket], None]]:
    """See `RunDir.find`.

    Args:
        node: What stands there, opened with O_PATH and no link followed; owned from now on.
        path: For messages only.
    """

    def connect(sock: socket.socket) -> None:
        try:
            sock.connect(f"/proc/self/fd/{node}")
        except OSError as error:
            raise LauncherError(f"{path}: {error.strerror or error}: nobody takes the connection (yet)") from error

    try:
        mode = os.stat(node).st_mode
        if not stat.S_ISSOCK(mode):
            kind = "a symbolic link: refused, never followed" if stat.S_ISLNK(mode) else "not a socket"
            raise Untrusted(f"{path} is {kind}")
        yield connect
    finally:
        os.close(node)


def new_unix() -> socket.socket:
    """Makes a non-blocking stream socket to dial a launcher with; the caller owns it."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


def _usual_run(root: int, below: str) -> str:
    """Distributions make /var/run a link to /run (FHS 3.15): walked as /run, which follows nothing."""
    head, _, rest = below.partition("var/run")
    if head or (rest and not rest.startswith("/")):
        return below
    try:
        var = os.open("var", _DIRECTORY, dir_fd=root)
    except OSError:
        return below
    try:
        usual = os.readlink("run", dir_fd=var) in ("/run", "../run")
    except OSError:
        return below
    finally:
        os.close(var)
    return f"run{rest}" if usual else below


def _explained(error: OSError, component: str, folder: int, path: str) -> LauncherError:
    with suppress(OSError):
        if stat.S_ISLNK(os.stat(component, dir_fd=folder, follow_symlinks=False).st_mode):
            return Untrusted(f"{path} is a symbolic link: refused, never followed")
    return LauncherError(f"{path}: {error.strerror}")
