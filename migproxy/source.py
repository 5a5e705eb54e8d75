"""The source side of a migration: unix sockets in the launcher's folder, each leading to a port of the target's."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass

from asyncinotify import Mask

from migproxy.fds import quench
from migproxy.launcher import LauncherError, RunDir
from migproxy.plan import Role, SourceProxy
from migproxy.portmap import MIGRATION_PROXY_DIR, Channel, source_socket_name
from migproxy.proxy import Proxy, ProxyError, Surroundings
from migproxy.relay.client import Lease
from migproxy.sockets import BACKLOG, connect_tcp, new_tcp
from migproxy.watch import Subscription, Watcher

_FOLDER_CHANGES = (
    Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO | Mask.MOVE_SELF | Mask.DELETE_SELF | Mask.ONLYDIR
)
_KEPT = 3  # listeners of one channel: an earlier daemon may have left two, and each may have somebody waiting
_CALM = 1.0  # seconds without a replacement after which the next one is put back at once again


@dataclass(frozen=True, slots=True)
class SocketFile:
    """A listener and the identity (device, inode) of the file that leads to it."""

    listener: socket.socket
    identity: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Accepting:
    """A listener that is stored, and the task that accepts from it."""

    listener: socket.socket
    lease: Lease
    task: asyncio.Task[None]


class SocketFolder:
    """The migrationproxy folder of a launcher; owns its descriptor.

    Attributes:
        fd: The folder.
        path: Its path, for messages only.
        owner: User and group that libvirt and QEMU run as in the pod, or they could not connect.
        mode: Of a socket file: its owner's and group's alone.
        is_shared: Whether somebody else puts sockets there by right, so that replacing one is no surprise.
        longest_pause: Seconds between two times that a socket file is put back, when somebody insists.
        patience: Seconds after which a name is looked at again that `invites` said no to; None: it never does.

    Args:
        run: The launcher's /var/run.
        owner: The owner to use, or None for that of the launcher's kubevirt folder.

    Raises:
        LauncherError: The kubevirt folder is missing, or a symbolic link stands in the way.
        ProxyError: The folder cannot be made, or cannot be given to the owner.
    """

    mode = 0o660
    is_shared = False
    longest_pause = 1.0
    patience: float | None = None

    def __init__(self, run: RunDir, owner: tuple[int, int] | None) -> None:
        self.path = f"{run.path}/{MIGRATION_PROXY_DIR}"
        parent, name = MIGRATION_PROXY_DIR.split("/")
        kubevirt = run.open_folder(parent)
        try:
            status = os.stat(kubevirt)
            self.owner = owner or (status.st_uid, status.st_gid)
            with suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=kubevirt)
        except OSError as error:
            raise ProxyError(f"{self.path} cannot be made: {error.strerror}") from error
        finally:
            os.close(kubevirt)
        self.fd = run.open_folder(MIGRATION_PROXY_DIR)
        try:
            self.give(self.fd, self.path)
        except ProxyError:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Closes the folder; what stands in it stays."""
        os.close(self.fd)

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the folder, None once it has been removed."""
        status = os.stat(self.fd)
        return (status.st_dev, status.st_ino) if status.st_nlink else None

    def give(self, fd: int, path: str) -> None:
        """Gives the folder, or a socket in it, to the owner, unless it is theirs.

        Raises:
            ProxyError: Not permitted.
        """
        status = os.stat(fd)
        if (status.st_uid, status.st_gid) == self.owner:
            return
        try:
            os.chown(f"/proc/self/fd/{fd}", *self.owner)
        except OSError as error:
            raise ProxyError(
                f"{path} cannot be given to {self.owner[0]}:{self.owner[1]}: {error.strerror}; run as root "
                "(CAP_CHOWN), or name another --socket-owner"
            ) from error

    def invites(self, name: str) -> bool:
        """Whether a socket file is to be put at a name now."""
        return True

    def place(self, name: str) -> SocketFile | None:
        """Puts a listening socket at `name`, atomically, over whatever stands there: nobody finds the name empty.

        Returns:
            None where the name does not invite it any more.

        Raises:
            ProxyError: It cannot be done; says why.
        """
        temporary = temporary_name(name)
        path = f"{self.path}/{name}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._discard(temporary, name)
            os.fchmod(listener.fileno(), self.mode)  # the file is made with it (net/unix/af_unix.c)
            listener.bind(f"/proc/self/fd/{self.fd}/{temporary}")
            identity = self._prepare(temporary, path)
            listener.listen(BACKLOG)
            if self._put(temporary, name):
                return SocketFile(listener, identity)
        except OSError as error:
            self._drop(listener, temporary, name)
            raise ProxyError(f"{path} cannot be put in place: {error.strerror}") from error
        except ProxyError:
            self._drop(listener, temporary, name)
            raise
        self._drop(listener, temporary, name)
        return None

    def _drop(self, listener: socket.socket, temporary: str, name: str) -> None:
        listener.close()
        with suppress(OSError):
            self._discard(temporary, name)

    def _discard(self, temporary: str, name: str) -> None:
        """Clears the temporary name of what a daemon left that was killed."""
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=self.fd)

    def _put(self, temporary: str, name: str) -> bool:
        os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        return True

    def _prepare(self, temporary: str, path: str) -> tuple[int, int]:
        node = os.open(temporary, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            status = os.stat(node)
            if not stat.S_ISSOCK(status.st_mode) or status.st_nlink != 1:
                raise ProxyError(f"{path}: somebody in the pod replaced the socket while it was being made")
            self.give(node, path)
            os.chmod(f"/proc/self/fd/{node}", self.mode)
        finally:
            os.close(node)
        return status.st_dev, status.st_ino

    def holds(self, name: str, file: SocketFile) -> bool:
        """Whether `name` still leads to that listener."""
        try:
            status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == file.identity

    def remove(self, name: str, file: SocketFile) -> None:
        """Removes the socket file, if it is that one; somebody else's stays."""
        if self.holds(name, file):
            with suppress(OSError):
                os.unlink(name, dir_fd=self.fd)

    def mend(self, name: str) -> bool:
        """Clears what a daemon left at a name that was killed, where no socket file of this one's is put.

        Returns:
            Whether the name leads elsewhere now.

        Raises:
            ProxyError: It cannot be cleared.
        """
        return False


def temporary_name(name: str) -> str:
    """Where a socket file is made before it is put at `name`."""
    return ".migproxy-" + hashlib.sha256(name.encode()).hexdigest()[:16]


class _Place:
    """One channel's socket file, with the listener that its name leads to and the one before.

    A connection that had looked the old file up while it was being replaced still arrives at the old listener,
    so that one goes on accepting until the next replacement.
    """

    def __init__(self, name: str, channel: Channel) -> None:
        self.name = name
        self.channel = channel
        self.file: SocketFile | None = None
        self._accepting: list[_Accepting] = []

    async def put(self, folder: SocketFolder, proxy: Proxy) -> bool:
        """Puts a new socket file in place and accepts from it; where an earlier daemon's stands, that one.

        Returns:
            Whether it is in place: not where the name does not invite it any more.

        Raises:
            ProxyError: It cannot be put there; what was accepting goes on.
        """
        for inherited in proxy.inherit(self.channel):
            file = SocketFile(inherited.socket, inherited.identity)
            # Whatever stands at the name by now: who had connected to this one is served.
            self._accept(file, inherited.lease, proxy)
            if folder.holds(self.name, file):
                self.file = file
        if self.file is not None and folder.holds(self.name, self.file):
            return True
        placed = folder.place(self.name)
        if placed is None:
            return False
        self._accept(placed, proxy.lease_listener(self.channel, placed.listener, placed.identity), proxy)
        self.file = placed
        await self._close(self._accepting[:-_KEPT])
        return True

    def _accept(self, file: SocketFile, lease: Lease, proxy: Proxy) -> None:
        task = asyncio.create_task(proxy.accept(file.listener, self.channel))
        self._accepting.append(_Accepting(file.listener, lease, task))

    def leave(self, folder: SocketFolder) -> None:
        """Takes the file away, if it is ours; what arrives by it already is still accepted."""
        if self.file is not None:
            folder.remove(self.name, self.file)
        else:
            with suppress(ProxyError):  # it has only refused whoever came by it
                folder.mend(self.name)

    async def remove(self, folder: SocketFolder | None) -> None:
        """Takes the file away, if it is ours, and stops accepting."""
        if folder is not None:
            self.leave(folder)
        self.file = None
        await self._close(self._accepting)

    async def _close(self, accepting: list[_Accepting]) -> None:
        closing_now = list(accepting)
        self._accepting = [one for one in self._accepting if one not in closing_now]
        for one in closing_now:
            one.task.cancel()
        await asyncio.gather(*(one.task for one in closing_now), return_exceptions=True)
        for one in closing_now:
            one.lease.drop()
            quench(one.listener)


class Source(Proxy):
    """The source proxy of one migration: owns the socket files in the launcher's folder and the folder's watch.

    Attributes:
        plan: What it does now.
        problem: What keeps its sockets from being in place, None while they are.
    """

    role = Role.SOURCE
    retriable = (OSError,)

    def __init__(
        self,
        plan: SourceProxy,
        around: Surroundings,
        watcher: Watcher,
        owner: tuple[int, int] | None,
        folders: type[SocketFolder] = SocketFolder,
    ) -> None:
        super().__init__(plan.migration, around)
        self.plan = plan
        self.problem: str | None = None
        self._watcher = watcher
        self._owner = owner
        self._folders = folders
        self._gives_back = False
        self._folder: SocketFolder | None = None
        self._places: dict[Channel, _Place] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._change = asyncio.Lock()
        self._is_placed = False

    async def apply(self, plan: SourceProxy) -> None:
        """Makes the listeners equal to the plan; connections that are open go on as they are.

        Args:
            plan: New or changed: the target's address, its ports, the channels, the launcher's pod.

        Raises:
            LauncherError, ProxyError: The launcher's folder or a socket file cannot be had; what was there stays.
        """
        moved = (plan.address, plan.ports) != (self.plan.address, self.plan.ports)
        self.plan = plan
        self.inherit_only([*plan.ports])
        async with self._change:
            await self._settle(self._open_folder())
            for channel in [known for known in self._places if known not in plan.ports]:
                await self._places.pop(channel).remove(self._folder)
            for channel in plan.ports:
                if channel not in self._places:
                    self._places[channel] = _Place(source_socket_name(plan.key, channel), channel)
            placed = await self._put_back()
        if placed or moved:
            for warning in plan.warnings:
                self.log.warning(warning)
            for channel in plan.ports:
                self.log.info(
                    "listening",
                    channel=channel.label,
                    socket=self.listening(channel),
                    peer=self.peer(channel),
                )
        if self._keeper is None and not self._gives_back:
            self._keeper = asyncio.create_task(self._keep())
        self.problem = None

    @property
    def is_in_path(self) -> bool:
        """Whether connections are led here: each channel's socket file has been put in place."""
        return self._is_placed

    def listening(self, channel: Channel) -> str | None:
        """Where a channel's connections are accepted, for people; None while they are not."""
        return f"{self._folder.path}/{source_socket_name(self.plan.key, channel)}" if self._folder else None

    def peer(self, channel: Channel) -> str:
        port = self.plan.ports.get(channel)
        host = f"[{self.plan.address}]" if self.plan.address.version == 6 else str(self.plan.address)
        return f"{host}:{port}"

    def _open_folder(self) -> SocketFolder:
        with self.around.launchers.open(self.plan.launcher) as run:
            return self._folders(run, self._owner)

    async def _settle(self, folder: SocketFolder) -> None:
        """Goes on in that folder: where it is another one, the sockets in the old one go; connections stay."""
        if self._folder is not None and folder.identity == self._folder.identity:
            folder.close()
            return
        old, self._folder = self._folder, folder
        for place in self._places.values():
            await place.remove(old)
        if old is not None:
            old.close()

    async def _put_back(self) -> list[str]:
        """Puts every socket file in place that is not there and may be; returns their names."""
        if self._gives_back:
            return []
        assert self._folder is not None
        missing = self._missing(self._folder)
        placed = []
        for place in [place for place in missing if self._folder.invites(place.name)]:
            if not self._gives_back and await place.put(self._folder, self):
                placed.append(place.name)
        self._is_placed = self._is_placed or len(placed) == len(missing)
        return placed

    def _missing(self, folder: SocketFolder) -> list[_Place]:
        return [p for p in self._places.values() if p.file is None or not folder.holds(p.name, p.file)]

    async def _keep(self) -> None:
        """Keeps the socket files in place, whoever removes or replaces them, until cancelled."""
        loop, pause = asyncio.get_running_loop(), 0.0
        while True:
            began = loop.time()
            try:
                await self._await_change()
                async with self._change:
                    await self._settle(self._open_folder())
                    put_back = await self._put_back()
            except (LauncherError, ProxyError, OSError) as error:
                if self.problem != str(error):
                    self.log.error("sockets are not in place", error=str(error))
                self.problem = str(error)
            else:
                self.problem = None
                if not put_back:
                    continue
                if self._folders.is_shared:
                    self.log.info("socket files put over virt-handler's", names=put_back)
                else:
                    self.log.warning("socket files put back that somebody removed or replaced", names=put_back)
            pause = min(max(pause * 2, 0.01), self._folders.longest_pause) if loop.time() - began < _CALM else 0.0
            await asyncio.sleep(pause)

    async def _await_change(self) -> None:
        """Returns when something in the folder may have changed; at once when that happened before it was watched."""
        if self.problem is not None or self._folder is None or self._folder.identity is None:
            return
        with self._watcher.watch(f"/proc/self/fd/{self._folder.fd}", _FOLDER_CHANGES) as changes:
            missing = self._missing(self._folder)
            if any(self._folder.invites(place.name) for place in missing):
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(self._folder.patience if missing else None):
                    await self._named_change(changes)

    async def _named_change(self, changes: Subscription) -> None:
        async for change in changes:
            if change.gone or change.overflow or change.name is None:
                return
            if any(change.name == place.name for place in self._places.values()):
                return

    def retire(self) -> None:
        """Stops keeping the socket files in place: another owner of the same names may follow."""
        if self._keeper is not None:
            self._keeper.cancel()

    def give_back(self) -> None:
        """Takes the socket files away, for whoever comes after; what is on its way to them is still accepted."""
        self.retire()
        self._gives_back = True
        for place in self._places.values():
            if self._folder is not None:
                place.leave(self._folder)

    async def _dial(self, channel: Channel, lease: Lease) -> socket.socket:
        address, port = self.plan.address, self.plan.ports.get(channel)
        if port is None:
            raise OSError(f"the target publishes no port for channel {channel.label}")
        local = self.around.local_address(address.version)
        try:
            sock = new_tcp(local, self.around.tcp)
        except OSError as error:
            raise OSError(f"cannot connect from {local}: {error.strerror}") from error
        try:
            async with self.stored(sock, lease):
                await connect_tcp(sock, address, port)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)  # the loop's own words repeat the address
            raise OSError(f"{self.peer(channel)}: {why}") from error
        return sock

    async def close(self) -> None:
        """Removes the socket files that are ours, and ends every connection."""
        self.retire()
        if self._keeper is not None:
            await asyncio.gather(self._keeper, return_exceptions=True)
        for place in self._places.values():
            await place.remove(self._folder)
        if self._folder is not None:
            self._folder.close()
            self._folder = None
        await super().close()
