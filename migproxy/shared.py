"""The migrationproxy folder that virt-handler puts its own sockets into: ours stand over them, and step aside.

virt-handler removes a path, listens there, and only then asks the launcher to migrate; when it is done it removes
whatever stands at the path. Both sockets lead to the same launcher, so that whoever's is there may serve, and ours
hands over to virt-handler's what cannot go by migproxy. What holds at every moment, whatever either does:

- virt-handler's present socket is never unlinked by us. renameat2(2) exchanges it with ours in one step, and it is kept
  beside until ours goes; then they are exchanged again. Between the two the path always leads to a listener.
- A missing path is virt-handler's to fill: nothing of ours is put where nothing of virt-handler's stands.
- A socket of ours is told from any other by its mode: the sticky bit, which means nothing on a socket and is there from
  the file's first moment on. So a daemon that was killed leaves nothing that the next one could mistake for
  virt-handler's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from contextlib import suppress
from typing import Final

from migproxy.launcher import LauncherError, Launchers, SocketNode, is_source_socket
from migproxy.plan import SourceProxy
from migproxy.portmap import source_socket_name
from migproxy.proxy import ProxyError
from migproxy.source import SocketFile, SocketFolder, temporary_name

_RENAME_EXCHANGE: Final = 2  # linux/fs.h
_RENAME_NOREPLACE: Final = 1

_libc = ctypes.CDLL(None, use_errno=True)


class SharedFolder(SocketFolder):
    """A launcher's migrationproxy folder, beside virt-handler.

    Args:
        run: The launcher's /var/run.
        owner: See `SocketFolder`.
    """

    is_shared = True
    longest_pause = 0.02  # virt-handler makes its sockets anew, one after the other, and then asks the launcher

    def invites(self, name: str) -> bool:
        try:
            return self._mode_of(name) is not None
        except OSError as error:
            raise ProxyError(f"{self.path}/{name} cannot be looked at: {error.strerror}") from error

    def kept(self, name: str) -> SocketNode:
        for candidate in (_aside(name), name):  # where ours has stepped aside, it is at its own name again
            try:
                node = self._open(candidate)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise LauncherError(f"{self.path}/{candidate}: {error.strerror}") from error
            # The pod may have linked ours there: a connection to itself never ends.
            if not is_source_socket(os.stat(node).st_mode):
                return SocketNode(node, f"{self.path}/{candidate}")
            os.close(node)
        raise LauncherError(f"{self.path}/{name}: No such file of virt-handler's")

    def _put(self, temporary: str, name: str) -> bool:
        try:
            self._rename(temporary, name, _RENAME_EXCHANGE)
        except FileNotFoundError:  # virt-handler has removed it in this very moment
            return False
        try:
            self._keep(temporary, name)
        except (OSError, ProxyError):
            if self._may_be_ours(name):
                self._rename(temporary, name, _RENAME_EXCHANGE)
            raise
        return True

    def _may_be_ours(self, name: str) -> bool:
        """Whether ours stands at a name, or nobody can tell."""
        try:
            return is_source_socket(self._mode_of(name))
        except OSError:
            return True

    def _keep(self, displaced: str, name: str) -> None:
        """Puts aside what stood at a name, for when ours goes; a dead one of ours has no use any more."""
        mode = self._mode_of(displaced)
        if mode is None:  # taken away by the pod: there is nothing to keep
            return
        if is_source_socket(mode):
            self._unlink(displaced)
            return
        self._hand_to_owner(displaced)
        self._rename(displaced, _aside(name), 0)

    def _hand_to_owner(self, name: str) -> None:
        """Does what virt-handler may not have come to yet: by now it would find ours at the path."""
        node = self._open(name)
        try:
            status = os.stat(node)
            if stat.S_ISSOCK(status.st_mode) and status.st_nlink == 1:  # not some other socket that the pod has linked
                self.give(node, f"{self.path}/{name}")
        finally:
            os.close(node)

    def _discard(self, temporary: str, name: str) -> None:
        """Clears what a daemon left that was killed between exchanging two sockets and putting one aside."""
        if (mode := self._mode_of(temporary)) is None:
            return
        if is_source_socket(mode):
            self._unlink(temporary)
        else:
            self._rename(temporary, _aside(name), 0)

    def remove(self, name: str, file: SocketFile) -> None:
        """Puts virt-handler's socket back where ours stands; where it does not, virt-handler's is another by now."""
        with suppress(OSError):  # in which case virt-handler's stays where it is kept, for whoever mends it
            self._give_back(name, is_ours=self.holds(name, file))

    def mend(self, name: str) -> bool:
        try:
            self._discard(temporary_name(name), name)
            is_ours = is_source_socket(self._mode_of(name))
            self._give_back(name, is_ours=is_ours)
        except OSError as error:
            raise ProxyError(f"{self.path}/{name} cannot be given back to virt-handler: {error.strerror}") from error
        return is_ours

    def _give_back(self, name: str, *, is_ours: bool) -> None:
        if is_ours:
            with suppress(FileNotFoundError, FileExistsError):  # virt-handler clears or fills it in this very moment
                self._step_aside(name, _aside(name))
            if is_source_socket(self._mode_of(name)):
                raise OSError(errno.EAGAIN, "ours is still there")
        elif is_source_socket(self._mode_of(name)):
            return  # of the VMI's next migration, and so is what is kept
        with suppress(FileNotFoundError):
            self._unlink(_aside(name))

    def _step_aside(self, name: str, aside: str) -> None:
        try:
            self._rename(aside, name, _RENAME_EXCHANGE)
        except FileNotFoundError:  # nothing of virt-handler's has stood there
            self._rename(name, aside, _RENAME_NOREPLACE)
            if not is_source_socket(self._mode_of(aside)):
                self._rename(aside, name, _RENAME_NOREPLACE)
            return
        if not is_source_socket(self._mode_of(aside)):  # it was replaced in this very moment: that one stays
            self._rename(aside, name, _RENAME_EXCHANGE)

    def _mode_of(self, name: str) -> int | None:
        try:
            return self._look(name).st_mode
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EXDEV:  # it may be ours, or virt-handler's
                raise
            return 0  # something is mounted there

    def _unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self.fd)

    def _rename(self, old: str, new: str, flags: int) -> None:
        if _libc.renameat2(self.fd, old.encode(), self.fd, new.encode(), flags):
            number = ctypes.get_errno()
            why = "the file system cannot exchange two files" if number == errno.EINVAL else os.strerror(number)
            raise OSError(number, why)


def mend(launchers: Launchers, source: SourceProxy, owner: tuple[int, int] | None) -> list[str]:
    """Gives virt-handler's sockets back where a daemon that was killed has left its own: those lead to nobody.

    Args:
        launchers: Those of this node.
        source: Whose sockets.
        owner: See `SocketFolder`.

    Returns:
        The names that led to ours.

    Raises:
        LauncherError, ProxyError: The folder cannot be had.
    """
    with launchers.open(source.launcher) as run:
        folder = SharedFolder(run, owner)
    try:
        return [name for channel in source.channels if folder.mend(name := source_socket_name(source.key, channel))]
    finally:
        folder.close()


def _aside(name: str) -> str:
    """Where virt-handler's socket is kept: beside its own name, so that people see whose it is."""
    return f".virt-handler-{name}"
