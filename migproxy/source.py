"""The source side of a migration: unix sockets in the launcher's folder, each leading to a port of the target's."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

from asyncinotify import Mask

from migproxy import route
from migproxy.beneath import open_beneath
from migproxy.fds import quench, reset
from migproxy.greeting import Greet
from migproxy.launcher import LauncherError, RunDir, SocketNode
from migproxy.launcherthread import NoAnswer
from migproxy.netif import MigrationAddress
from migproxy.pauses import doubling
from migproxy.plan import Reason, Role, SourceProxy
from migproxy.portmap import MIGRATION_PROXY_DIR, Channel, IPAddress, source_socket_name
from migproxy.proxy import DialError, Proxy, ProxyError, Surroundings
from migproxy.relay.client import Lease
from migproxy.sockets import BACKLOG, address_of, connect_tcp, new_tcp
from migproxy.tls import Meeting
from migproxy.tlserrors import Reason as TLSReason
from migproxy.tlserrors import TLSError
from migproxy.transport import Transport
from migproxy.watch import Subscription, Watcher

_FOLDER_CHANGES = (
    Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO | Mask.MOVE_SELF | Mask.DELETE_SELF | Mask.ONLYDIR
)
_KEPT = 3  # listeners of one channel: an earlier daemon may have left two, and each may have somebody waiting
_ANNOUNCED_SECONDS = 0.45  # connecting, TLS and the target's word: half a second more than without us, in all
_REMAKE_SECONDS = 0.25  # that virt-handler may take to make its sockets anew
_BY_VIRT_HANDLER = "virt-handler's"
_PASSING = {Reason.UNANNOUNCED, Reason.VERSION, Reason.MALFORMED, Reason.CHANNEL}  # known before anything is tried
_LONGEST_PAUSE = 1.0  # seconds between two times that what has failed is tried
_LOOK_SECONDS = 1.5  # between two looks whether the launcher's folder is the same: nobody tells of one above it
_WORKSHOP = ".migproxy-new"
_ANSWERS = {errno.ECONNREFUSED, errno.ECONNRESET}  # of the target: packets find their way
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
        mode: Of a socket file: its owner's and group's alone, and a source's (`launcher.is_source_socket`).
        is_shared: Whether somebody else puts sockets there by right, so that replacing one is no surprise.
        longest_pause: Seconds between two times that a socket file is put back, when somebody insists.

    Args:
        run: The launcher's /var/run.
        owner: The owner to use, or None for that of the launcher's kubevirt folder.

    Raises:
        LauncherError: The kubevirt folder is missing, or a symbolic link or a mount stands in the way.
        ProxyError: The folder cannot be made, or is somebody else's.
    """

    mode = 0o1660
    is_shared = False
    longest_pause = 1.0

    def __init__(self, run: RunDir, owner: tuple[int, int] | None) -> None:
        self.path = f"{run.path}/{MIGRATION_PROXY_DIR}"
        parent, name = MIGRATION_PROXY_DIR.split("/")
        kubevirt = run.open_folder(parent)
        try:
            status = os.stat(kubevirt)
            self.owner = owner or (status.st_uid, status.st_gid)
            if not run.holds(MIGRATION_PROXY_DIR):
                self._make(kubevirt, name)
        except OSError as error:
            raise ProxyError(f"{self.path} cannot be made: {error.strerror}") from error
        finally:
            os.close(kubevirt)
        self.fd = run.open_folder(MIGRATION_PROXY_DIR)
        status = os.stat(self.fd)
        # virt-handler makes it as root, and leaves it so (KubeVirt's createUnixListener).
        if (status.st_uid, status.st_gid) != self.owner and status.st_uid not in (0, os.geteuid()):
            os.close(self.fd)
            raise ProxyError(
                f"{self.path} belongs to {status.st_uid}:{status.st_gid}, not to {self.owner[0]}:{self.owner[1]}; "
                "migproxy gives nobody what it has not made: change its owner, or name another --socket-owner"
            )

    def _make(self, kubevirt: int, name: str) -> None:
        """Makes the folder where the pod cannot put another one in its place before it is given to the owner."""
        if not _may_write(os.stat(kubevirt), *self.owner):  # the pod may have mounted anything there
            raise ProxyError(
                f"{self.path} is missing, and {self.owner[0]}:{self.owner[1]} may not make it itself: make it, or name "
                "another --socket-owner"
            )
        with suppress(FileExistsError):
            os.mkdir(_WORKSHOP, 0o700, dir_fd=kubevirt)
        workshop = open_beneath(kubevirt, _WORKSHOP, is_folder=True, one_mount=True)
        try:
            status = os.stat(workshop)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise ProxyError(f"{self.path}: {_WORKSHOP} beside it is not migproxy's own: remove it")
            with suppress(FileNotFoundError):  # of one that was killed here
                os.rmdir(name, dir_fd=workshop)
            os.mkdir(name, 0o755, dir_fd=workshop)
            made = open_beneath(workshop, name, is_folder=True, one_mount=True)
            try:
                self.give(made, self.path)
            finally:
                os.close(made)
            os.rename(name, name, src_dir_fd=workshop, dst_dir_fd=kubevirt)
        finally:
            os.close(workshop)
            with suppress(OSError):
                os.rmdir(_WORKSHOP, dir_fd=kubevirt)

    def close(self) -> None:
        """Closes the folder; what stands in it stays."""
        os.close(self.fd)

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the folder, None once it has been removed."""
        status = os.stat(self.fd)
        return (status.st_dev, status.st_ino) if status.st_nlink else None

    def give(self, fd: int, path: str) -> None:
        """Gives what this process has made to the owner, unless it is theirs.

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
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise ProxyError(f"{path} cannot be made: {error.strerror}") from error
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
        node = self._open(temporary)
        try:
            status = os.stat(node)
            is_as_made = stat.S_ISSOCK(status.st_mode) and (status.st_uid, status.st_nlink) == (os.geteuid(), 1)
            if not is_as_made:
                raise ProxyError(f"{path}: somebody in the pod replaced the socket while it was being made")
            os.chmod(f"/proc/self/fd/{node}", self.mode)  # while it is still ours (CAP_FOWNER)
            self.give(node, path)
        finally:
            os.close(node)
        return status.st_dev, status.st_ino

    def _open(self, name: str) -> int:
        """Opens what stands at a name with O_PATH, no link followed and no mount entered."""
        return open_beneath(self.fd, name, is_folder=False, one_mount=True)

    def _look(self, name: str) -> os.stat_result:
        """What stands at a name, no link followed and no mount entered."""
        node = self._open(name)
        try:
            return os.stat(node)
        finally:
            os.close(node)

    def holds(self, name: str, file: SocketFile) -> bool:
        """Whether `name` still leads to that listener."""
        try:
            status = self._look(name)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == file.identity

    def remove(self, name: str, file: SocketFile) -> None:
        """Removes the socket file, if it is that one; somebody else's stays."""
        if self.holds(name, file):
            with suppress(OSError):
                os.unlink(name, dir_fd=self.fd)

    def kept(self, name: str) -> SocketNode:
        """Finds the socket that stood at a name before ours; the caller closes it.

        Raises:
            LauncherError: There is none.
        """
        raise LauncherError(f"{self.path}/{name}: there was none before ours")

    def mend(self, name: str) -> bool:
        """Clears what a daemon left at a name that was killed, where no socket file of this one's is put.

        Returns:
            Whether the name leads elsewhere now.

        Raises:
            ProxyError: It cannot be cleared.
        """
        return False


def _may_write(status: os.stat_result, uid: int, gid: int) -> bool:
    """Whether the mode of a file lets a user write to it."""
    if uid == 0:
        return True
    who = stat.S_IWUSR if status.st_uid == uid else stat.S_IWGRP if status.st_gid == gid else stat.S_IWOTH
    return bool(status.st_mode & who)


def temporary_name(name: str) -> str:
    """Where a socket file is made before it is put at `name`."""
    return ".migproxy-" + hashlib.sha256(name.encode()).hexdigest()[:16]


class Path(StrEnum):
    """How a connection gets to the other node, beside virt-handler."""

    MIGPROXY = "migproxy"
    VIRT_HANDLER = "virt-handler"


def _close(folder: SocketFolder | None) -> None:
    if folder is not None:
        folder.close()


class _NoWay(Exception):
    """A path is closed to a connection.

    Attributes:
        reason: Why.
    """

    def __init__(self, reason: Reason, why: str) -> None:
        super().__init__(why)
        self.reason = reason


class _Place:
    """One channel's socket file, with the listener that its name leads to and the one before.

    A connection that had looked the old file up while it was being replaced still arrives at the old listener,
    so that one goes on accepting until the next replacement.
    """

    def __init__(self, name: str, channel: Channel, proxy: Proxy) -> None:
        self.name = name
        self.channel = channel
        self.file: SocketFile | None = None
        self._proxy = proxy
        self._accepting: list[_Accepting] = []

    async def take_over(self, folder: SocketFolder) -> None:
        """Accepts from what an earlier daemon left."""
        files = []
        for inherited in self._proxy.inherit(self.channel):
            file = SocketFile(inherited.socket, inherited.identity)
            # Whatever stands at the name by now: who had connected to this one is served.
            self._accept(file, inherited.lease)
            files.append(file)
        if files:
            thread = self._proxy.thread
            held = await thread.run(lambda: [file for file in files if folder.holds(self.name, file)])
            self.file = held[-1] if held else self.file

    async def put(self, folder: SocketFolder) -> bool:
        """Puts a new socket file in place, unless one of ours stands there, and accepts from it.

        Returns:
            Whether there is a new one: not where the name does not invite it any more.

        Raises:
            LauncherError, ProxyError: It cannot be put there; what was accepting goes on.
        """
        file = self.file

        def put() -> SocketFile | None:
            if (file and folder.holds(self.name, file)) or not folder.invites(self.name):
                return None
            return folder.place(self.name)

        def discard(placed: SocketFile | None) -> None:
            if placed:
                folder.remove(self.name, placed)
                placed.listener.close()

        placed = await self._proxy.thread.run(put, discard)
        if placed is None:
            return False
        self._accept(placed, self._proxy.lease_listener(self.channel, placed.listener, placed.identity))
        self.file = placed
        await self._close(self._accepting[:-_KEPT])
        return True

    def _accept(self, file: SocketFile, lease: Lease) -> None:
        task = asyncio.create_task(self._proxy.accept(file.listener, self.channel))
        self._accepting.append(_Accepting(file.listener, lease, task))

    async def leave(self, folder: SocketFolder) -> None:
        """Takes the file away, if it is ours; what arrives by it already is still accepted."""
        with suppress(LauncherError, ProxyError):  # it hangs; or what stands there has only refused whoever came by it
            await self._proxy.thread.run(self.leaving(folder))

    def leaving(self, folder: SocketFolder) -> Callable[[], object]:
        """Forgets the file; returns what takes it away, for the proxy's thread."""
        file, self.file = self.file, None
        return partial(folder.mend, self.name) if file is None else partial(folder.remove, self.name, file)

    async def remove(self, folder: SocketFolder | None) -> None:
        """Takes the file away, if it is ours, and stops accepting."""
        if folder is not None:
            await self.leave(folder)
        await self.close()

    async def close(self) -> None:
        """Stops accepting."""
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
        route_problem: Why the target is not reached, or may not answer; None where nothing says so.
    """

    role = Role.SOURCE
    retriable = (OSError, ProxyError)  # an address, too, may be back within a second

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
        self._led = plan.address, plan.ports
        self.problem: str | None = None
        self.route_problem: str | None = None
        self._watcher = watcher
        self._owner = owner
        self._folders = folders
        self._gives_back = False
        self._unwatched: str | None = None
        self._folder: SocketFolder | None = None
        self._places: dict[Channel, _Place] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._change = asyncio.Lock()
        # Of a migration, not of a connection: what has failed once is not tried first again.
        self._paths = [Path.MIGPROXY, Path.VIRT_HANDLER]
        self._why: str | None = None
        self._reason: Reason | None = None

    def redirect(self, plan: SourceProxy) -> None:
        """Leads connections where the plan says from now on, whatever keeps `apply` waiting."""
        self.plan = plan

    async def apply(self, plan: SourceProxy) -> None:
        """Makes the listeners equal to the plan; connections that are open go on as they are.

        Args:
            plan: New or changed: the target's address, its ports, the channels, the launcher's pod.

        Raises:
            LauncherError, ProxyError: The launcher's folder or a socket file cannot be had; what was there stays.
        """
        self.redirect(plan)
        moved, self._led = self._led != (plan.address, plan.ports), (plan.address, plan.ports)
        self.inherit_only(plan.channels)
        try:
            placed = await self._place_all()
        except (LauncherError, ProxyError) as error:
            self.problem = str(error)
            raise
        if placed or moved:
            for warning in plan.warnings:
                self.log.warning(warning)
            for channel in filter(self.listening, plan.channels):
                self.log.info(
                    "listening",
                    channel=channel.label,
                    socket=self.listening(channel),
                    peer=self.peer(channel),
                )
        if (self._keeper is None or self._keeper.done()) and not self._gives_back:
            self._keeper = asyncio.create_task(self._keep())
        self.problem = None
        self._look_at_route(must=plan.beside is None)  # else there is virt-handler's way as well

    async def _place_all(self) -> list[str]:
        async with self._change:
            await self._settle()
            channels = self.plan.channels
            for channel in [known for known in self._places if known not in channels]:
                await self._places.pop(channel).remove(self._folder)
            for channel in channels:
                if channel not in self._places:
                    self._places[channel] = _Place(source_socket_name(self.plan.key, channel), channel, self)
            return await self._put_back()

    @property
    def is_in_path(self) -> bool:
        """Whether connections are led here: a channel's socket file has been put in place."""
        return any(place.file for place in self._places.values())

    def listening(self, channel: Channel) -> str | None:
        """Where a channel's connections are accepted, for people; None while they are not."""
        place = self._places.get(channel)
        return f"{self._folder.path}/{place.name}" if self._folder and place and place.file else None

    def peer(self, channel: Channel) -> str:
        port = self.plan.ports.get(channel)
        if self.plan.address is None or port is None:
            return "virt-handler's socket"
        host = f"[{self.plan.address}]" if self.plan.address.version == 6 else str(self.plan.address)
        return f"{host}:{port}"

    def _reopen(self) -> SocketFolder | None:
        """Opens the launcher's folder, unless it is the one that is open."""
        with self.around.launchers.open(self.plan.launcher) as run:
            folder = self._folders(run, self._owner)
        if self._folder is not None and folder.identity == self._folder.identity:
            folder.close()
            return None
        return folder

    async def _settle(self, *, must: bool = True) -> None:
        """Goes on in the launcher's folder; where that is another one, the sockets in the old one go.

        Args:
            must: Whether a launcher that cannot be found is an error: at a migration's end it goes before it is told.
        """
        try:
            folder = await self.thread.run(self._reopen, _close)
        except LauncherError as error:
            if must or isinstance(error, NoAnswer):
                raise
            return
        if folder is None:
            return
        old, self._folder = self._folder, folder
        if old is not None:  # all of it is asked for before anything is waited for: whatever ends this, it is done
            for place in self._places.values():
                self.thread.later(place.leaving(old))
            self.thread.later(old.close)
        for place in self._places.values():
            await place.close()

    async def _put_back(self) -> list[str]:
        """Puts every socket file in place that is not there and may be; returns their names."""
        if self._gives_back:
            return []
        assert self._folder is not None
        folder, beside = self._folder, self.plan.beside
        if beside and beside.out_reason is Reason.UNREADY:
            for place in self._places.values():
                await place.leave(folder)
        placed = []
        for place in await self.thread.run(lambda: self._missing(folder)):
            await place.take_over(folder)
            if place.file is None and beside and beside.stays_out:
                # It may be a dead daemon's that stands there.
                await self.thread.run(partial(folder.mend, place.name))
            elif not self._gives_back and await place.put(folder):
                placed.append(place.name)
        return placed

    def _has_work(self, folder: SocketFolder) -> bool:
        """Whether a socket file is to be put in place, or the folder has gone."""
        stays_out = bool(self.plan.beside and self.plan.beside.stays_out)
        missing = self._missing(folder)
        return folder.identity is None or any(
            folder.invites(place.name) and not (stays_out and place.file is None) for place in missing
        )

    def _missing(self, folder: SocketFolder) -> list[_Place]:
        return [p for p in list(self._places.values()) if p.file is None or not folder.holds(p.name, p.file)]

    async def _keep(self) -> None:
        """Keeps the socket files in place, whoever removes or replaces them, until cancelled."""
        loop, pause = asyncio.get_running_loop(), 0.0
        while True:
            began = loop.time()
            try:
                has_changed = await self._await_change()
                async with self._change:
                    await self._settle(must=has_changed)
                    put_back = await self._put_back()
            except (LauncherError, ProxyError, OSError) as error:
                if self.problem != str(error):
                    self.log.error("sockets are not in place", error=str(error))
                self.problem = str(error)
                pause = min(max(pause * 2, 0.01), _LONGEST_PAUSE)
            else:
                self.problem = None
                if put_back and self._folders.is_shared:
                    self.log.info("socket files put over virt-handler's", names=put_back)
                elif put_back:
                    self.log.warning("socket files put back that somebody removed or replaced", names=put_back)
                # Whoever changes the folder again and again slows this down, and nobody else.
                is_calm = loop.time() - began >= _CALM
                pause = 0.0 if is_calm else min(max(pause * 2, 0.01), self._folders.longest_pause)
            await asyncio.sleep(pause)

    async def _await_change(self) -> bool:
        """Returns when something in the folder may have changed; at once when that happened before it was watched.

        Returns:
            Whether it was told; else only time went by, in which a folder above may have been renamed.
        """
        folder = self._folder
        if self.problem is not None or folder is None:
            return True
        try:
            changes = await self._watcher.watch_aside(self.thread.run, f"/proc/self/fd/{folder.fd}", _FOLDER_CHANGES)
        except OSError as error:
            if self._folder is not folder:  # it has been closed meanwhile
                return True
            why = f"{folder.path}: {error.strerror} (raise the sysctl fs.inotify.max_user_watches)"
            if self._unwatched != why:
                self.log.error("socket files are looked at once a second, as their folder cannot be watched", error=why)
            self._unwatched = why
            await asyncio.sleep(_LONGEST_PAUSE)
            return False
        self._unwatched = None
        with changes:
            if await self.thread.run(lambda: self._folder is not folder or self._has_work(folder)):
                return True
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._named_change(changes)
                    return True
        return False

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

    async def give_back(self) -> None:
        """Takes the socket files away, for whoever comes after; what is on its way to them is still accepted."""
        self.retire()
        self._gives_back = True
        async with self._change:
            for place in self._places.values():
                if self._folder is not None:
                    await place.leave(self._folder)

    async def _dial(self, channel: Channel, lease: Lease) -> socket.socket:
        sock = self._new_tcp(channel)
        async with self.stored(sock, lease):
            await self._connect(sock, channel)
        return sock

    def _new_tcp(self, channel: Channel) -> socket.socket:
        if self.plan.address is None or channel not in self.plan.ports:
            raise OSError(f"the target has no port for channel {channel.label}")
        local = route.local_address(self.plan.address, self._own(self.plan.address))
        try:
            return new_tcp(local, self.around.tcp)
        except OSError as error:
            raise OSError(f"cannot connect from {local}: {error.strerror}") from error

    async def _connect(self, sock: socket.socket, channel: Channel) -> None:
        target = self.plan.address
        assert target
        try:
            await connect_tcp(sock, target, self.plan.ports[channel])
        except OSError as error:
            if error.errno in _ANSWERS:
                raise OSError(f"{self.peer(channel)}: {error.strerror}") from error
            local = address_of(sock.getsockname())
            found = route.look_up(target, local)
            if found.refusal:
                raise OSError(route.no_route(target, self._own(target), local, found)) from error
            raise OSError(f"{self.peer(channel)}: {error.strerror} (packets from {local}{found})") from error

    def no_answer(self, channel: Channel) -> str:
        """See Proxy; says where the packets have gone."""
        silence, target = super().no_answer(channel), self.plan.address
        try:
            assert target
            local = route.local_address(target, self._own(target))
        except ProxyError:  # it has gone meanwhile
            return silence
        return f"{silence} to packets from {local}{route.look_up(target, local)}"

    def _own(self, target: IPAddress) -> MigrationAddress:
        return self.around.migration_address(target.version)

    def _look_at_route(self, *, must: bool) -> None:
        """Says before the first connection that none would get to the target, or might stay unanswered.

        Args:
            must: Whether it is an error if none would.

        Raises:
            ProxyError: It is: no route leads there, or this node has no address of the target's IP version.
        """
        target = self.plan.address
        try:
            departure = route.depart(target, self._own(target)) if target else None
        except ProxyError:
            if must:
                raise
            return
        problem = departure.problem if departure else None
        is_new, self.route_problem = problem != self.route_problem, problem
        if departure and must and not departure.has_route:
            raise ProxyError(problem)
        if problem and is_new:
            self.log.warning("target may not be reached", why=problem)

    def sample(self) -> None:
        """See Proxy; looks at the route too, which changes without a word to us."""
        super().sample()
        self._look_at_route(must=False)

    def meeting(self, channel: Channel) -> Meeting:
        """See Proxy."""
        return Meeting(self.plan.name)

    # Beside virt-handler

    async def to_network(self, channel: Channel, legs: list[socket.socket], lease: Lease) -> Transport:
        """See Proxy; beside virt-handler by the first path that works: ours, or virt-handler's socket."""
        if self.plan.beside is None:
            return await super().to_network(channel, legs, lease)
        if len(legs) > 1:  # virt-handler has taken it already, from the daemon before this one
            return self._took(Path.VIRT_HANDLER, Transport(legs[-1], _BY_VIRT_HANDLER), channel)
        with self._turns[channel].take("launcher") as turn:
            first, tried = self._paths[0], []

            async def go() -> None:
                await turn()
                if first is Path.MIGPROXY and self._paths[0] is not first:
                    raise _NoWay(self._reason or Reason.REFUSED, f"one before it goes by virt-handler: {self._why}")

            for path in [*self._paths]:
                try:
                    if path is Path.VIRT_HANDLER:
                        await turn()
                        legs.append(await self._to_virt_handler(channel, lease))
                        return self._took(path, Transport(legs[-1], _BY_VIRT_HANDLER), channel)
                    transport = await self._to_announced(channel, go)
                    legs.append(transport.tcp)
                    return self._took(path, transport, channel)
                except _NoWay as error:
                    tried.append(str(error))
                    if path is Path.MIGPROXY:
                        self._why, self._reason = str(error), error.reason
                    if error.reason not in _PASSING:
                        self._paths.remove(path)
                        self._paths.append(path)
            raise DialError("; ".join(tried))

    def _took(self, path: Path, transport: Transport, channel: Channel) -> Transport:
        reason = str(self._reason or "") if path is Path.VIRT_HANDLER else ""
        self.progress.paths[path, reason] += 1
        if path is Path.VIRT_HANDLER:
            self.log.info("connection goes by virt-handler", channel=channel.label, reason=reason, why=self._why)
        return transport

    async def _to_announced(self, channel: Channel, go: Greet) -> Transport:
        """Connects to where the target's migproxy has announced that it listens, as far as that can be taken back."""
        assert self.plan.beside
        if self.plan.beside.reason:
            raise _NoWay(self.plan.beside.reason, str(self.plan.beside.why))
        if channel not in self.plan.ports:
            raise _NoWay(Reason.CHANNEL, f"the target's migproxy announces no port for channel {channel.label}")
        try:
            async with asyncio.timeout(_ANNOUNCED_SECONDS):
                sock = self._new_tcp(channel)
                try:
                    await self._connect(sock, channel)
                    return await self._secure(sock, replace(self._meet(channel, "launcher"), greet=go), server=False)
                except BaseException:
                    reset(sock)
                    raise
        except TimeoutError:
            why, reason = f"{self.peer(channel)}: not ready within {_ANNOUNCED_SECONDS:g} s", Reason.TIMEOUT
        except TLSError as error:
            self.around.security.errors[error.reason] += 1
            why, reason = f"{self.peer(channel)}: {error}", Reason.REFUSED
            if error.reason is TLSReason.NO_CREDENTIALS:
                reason = Reason.UNREADY
        except ProxyError as error:
            why, reason = str(error), Reason.UNREADY
        except OSError as error:
            why, reason = str(error), Reason.UNREACHABLE
        raise _NoWay(reason, why)

    async def _to_virt_handler(self, channel: Channel, lease: Lease) -> socket.socket:
        """Connects to virt-handler's own socket, as the launcher would have without us."""
        deadline, pauses = asyncio.get_running_loop().time() + _REMAKE_SECONDS, doubling(0.005, 0.05)
        while True:
            try:
                if self._folder is None:
                    raise LauncherError("the launcher's folder is gone")
                kept = partial(self._folder.kept, source_socket_name(self.plan.key, channel))
                return await self.connect_launcher(kept, lease)
            except LauncherError as error:  # it may be making its sockets anew
                if asyncio.get_running_loop().time() > deadline:
                    raise _NoWay(Reason.FAILED, f"virt-handler's socket: {error}") from error
            await asyncio.sleep(next(pauses))

    @property
    def path(self) -> tuple[Path, Reason | None, str | None] | None:
        """By which way the next connection goes, and why not by migproxy; None where only one way is known."""
        beside = self.plan.beside
        if beside is None:
            return None
        if self.problem:
            return Path.VIRT_HANDLER, Reason.FAILED, self.problem
        if not self.is_in_path:
            return (Path.VIRT_HANDLER, beside.out_reason, beside.stays_out) if beside.out_reason else None
        if beside.reason:
            return Path.VIRT_HANDLER, beside.reason, beside.why
        if self._paths[0] is Path.VIRT_HANDLER:
            return Path.VIRT_HANDLER, self._reason, self._why
        return Path.MIGPROXY, None, None

    async def close(self) -> None:
        """Removes the socket files that are ours, and ends every connection."""
        self.retire()
        if self._keeper is not None:
            await asyncio.gather(self._keeper, return_exceptions=True)
        for place in self._places.values():
            await place.remove(self._folder)
        if self._folder is not None:
            self.thread.later(self._folder.close)
            self._folder = None
        await super().close()
