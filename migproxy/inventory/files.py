"""VMIs from files: a folder of them, or a single one, followed by inotify.

A file is read when a writer has closed it, when it was renamed into its place, or when a symbolic link on
the way to it was set anew (ConfigMap mounts replace a folder's link), never while it is being written. It
counts as deleted when it has been missing for a moment: some editors rename the old file away before they
write the new one, and to believe that the VMI is gone would end its running migration. For the same reason nothing
else is taken for its end: neither an error, which is a problem and tried again until it is over, nor a file that has
turned empty, is cut off or does not parse.
"""

import asyncio
import errno
import fcntl
import hashlib
import math
import os
import secrets
import select
import stat
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from migproxy.fds import MORE_FILES
from migproxy.health import WatchHealth
from migproxy.inventory import InventoryError, PublishError
from migproxy.inventory.contents import EMPTY, Contents, EditError, Entry, Flaw, NothingInIt, SyntaxFlaw, newest
from migproxy.liveness import Liveness
from migproxy.pauses import doubling
from migproxy.portmap import IPAddress, PortMap
from migproxy.vmi import VMI
from migproxy.watch import FIRST_RETRY, LAST_RETRY, Mask, Subscription, Watcher

SUFFIXES: Final = (".yaml", ".yml", ".json")
MISSING_SECONDS: Final = 0.25
LOCK_SECONDS: Final = 10.0
SMALL_BYTES: Final = 1 << 14
"""Up to here, reading takes a few milliseconds of CPU."""
PUBLISH_ATTEMPTS: Final = 5
MAX_BYTES: Final = 16 << 20
"""Of a file: some 1,500 VMIs as kubectl prints them, or 10,000 of a few lines."""
MAX_LINKS: Final = 40
"""More symbolic links on one way are a loop to the kernel too (path_resolution(7))."""
MOUNT_SECONDS: Final = 1.0
"""Between two looks whether something else is mounted where a folder is watched: inotify tells nothing of it."""
MAX_LOOKS: Final = 10
"""At folders that appear and vanish while they are looked at; then it is a problem, and tried again."""

_WRITTEN: Final = Mask.CLOSE_WRITE | Mask.MOVED_TO
_WATCHED: Final = _WRITTEN | Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.ATTRIB | Mask.MOVE_SELF

Step = tuple[str, str]
"""A folder, and a name in it that was met on the way to a file."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Way:
    """The way to a file.

    Args:
        steps: that decide which file it is: each symbolic link met, and the last step. Where the way ends early, since
            something is missing or cannot be looked at, the last step is the one that failed.
        is_there: a regular file stands at its end.
        error: why that, or a part of the way, is not known.
    """

    steps: tuple[Step, ...]
    is_there: bool
    error: OSError | None


@dataclass(frozen=True, slots=True)
class _Look:
    """What was found.

    Args:
        root: the steps to the folder, or to the single file.
        folder: the folder's path without links; None for a single file.
        ways: to each file by its path.
        error: why all that is not known.
    """

    root: tuple[Step, ...]
    folder: str | None = None
    ways: Mapping[str, _Way] = field(default_factory=dict)
    error: OSError | None = None

    @property
    def folders(self) -> set[str]:
        """Where anything happens that changes what is found."""
        ways = (self.root, *(way.steps for way in self.ways.values()))
        found = {folder for steps in ways for folder, _ in steps}
        return found | {self.folder} if self.folder else found

    @property
    def present(self) -> set[str]:
        """The files that are there, or may be."""
        return {path for path, way in self.ways.items() if way.is_there or way.error}


@dataclass(frozen=True, slots=True)
class _File:
    """What is known of a file.

    Args:
        digest: of the bytes that were read last; empty before that.
        contents: in force; of a file with a flaw, what it held before.
        flaw: what is wrong with the file as a whole.
        unreadable: the flaw is that the file could not even be read.
    """

    digest: bytes = b""
    contents: Contents = EMPTY
    flaw: Flaw | None = None
    unreadable: bool = False


class FileInventory:
    """An `Inventory` of the VMIs in the *.yaml, *.yml and *.json files of a folder, or in a single file.

    If the folder (or the single file) itself vanishes, that is a problem, and what it held stays in force.

    Args:
        path: the folder or file.
        watcher: has to be running while `changes` is iterated.
        liveness: is told of each write, which hangs on a disk that does.

    Raises:
        InventoryError: the path is missing or cannot be read.
    """

    def __init__(self, path: str, watcher: Watcher, liveness: Liveness | None = None) -> None:
        self._liveness = liveness or Liveness()
        self._path = os.path.abspath(path)
        self._watcher = watcher
        self._root: tuple[Step, ...] = ()
        self._absent = False
        self._missing: dict[str, float] = {}
        self._unseen: set[str] = set()
        self._files: dict[str, _File] = {}  # in the order in which their VMIs were written
        self._since: dict[tuple[str, str], int] = {}  # path and UID: in which merge that was new
        self._merges = 0
        self._state: dict[str, VMI] = {}
        self._told: dict[str, VMI] = {}
        self._owners: dict[str, str] = {}
        self._problems: dict[str, str] = {}
        self._flaws: dict[str, str] = {}
        self._faulty: set[str] = set()
        self._last_event: float | None = None
        try:
            if os.path.isfile(self._path):
                open(self._path, "rb").close()
            if error := _look(self._path).error:
                raise error
        except OSError as error:
            raise InventoryError(_explained("cannot read VMIs from", self._path, error)) from error

    @property
    def problems(self) -> Mapping[str, str]:
        """Files and folders that cannot be read or followed now, and why."""
        unread = self._watcher.problem
        return ({self._path: unread} if unread else {}) | self._problems

    @property
    def flaws(self) -> Mapping[str, str]:
        """What is wrong now with what files hold: path or path:line to what it is."""
        return self._flaws

    def may_hide(self, uid: str) -> bool:
        """See `Inventory.may_hide`: what cannot be read or does not parse may be any VMI."""
        return bool(self.problems or self._flaws)

    @property
    def health(self) -> WatchHealth:
        """When the folder last changed."""
        return WatchHealth("files", self._last_event)

    async def changes(self) -> AsyncGenerator[Mapping[str, VMI | None], None]:
        """See `Inventory.changes`."""
        loop, feed = asyncio.get_running_loop(), _Feed(self._watcher)
        pauses, retry_at = doubling(FIRST_RETRY, LAST_RETRY), None
        synchronised = False
        try:
            while True:
                await self._refresh(feed, retries=retry_at is not None and loop.time() >= retry_at)
                batch = self._untold()
                if batch or not synchronised:
                    synchronised = True
                    yield batch
                if not self._problems:
                    pauses, retry_at = doubling(FIRST_RETRY, LAST_RETRY), None
                elif retry_at is None or loop.time() >= retry_at:
                    retry_at = loop.time() + next(pauses)
                await feed.wait([*self._missing.values(), *([retry_at] if retry_at else [])])
        finally:
            await feed.close()

    async def publish(self, vmi: VMI, address: IPAddress, ports: PortMap) -> None:
        """See `Inventory.publish`: an edited copy of the VMI's own file is renamed into its place.

        Daemons that share the folder take turns (flock on it); an editor's change is never overwritten.
        """
        if vmi.migration is None:
            raise PublishError(f"{_who(vmi)}: it has no status.migrationState to publish to")
        path = self._owners.get(vmi.uid)
        if path is None:
            raise PublishError(f"{_who(vmi)}: no file of {self._path} holds it any more")
        with self._liveness.writing(path):
            await asyncio.to_thread(_publish, path, vmi, str(address), ports.published())

    def note(self, vmi: VMI, reason: str, message: str, *, warning: bool = False) -> None:
        """See `Inventory.note`: a file has no place for it, and the log has it anyway."""

    async def _refresh(self, feed: "_Feed", *, retries: bool) -> None:
        """Bring `_files` up to the disk's state, reading no file but those that the news are about.

        Args:
            retries: what could not be read is tried again.
        """
        news = feed.take()
        if news.steps or news.everything:
            self._last_event = time.time()
        if self._absent or self._is_replaced(news):
            news.everything = True
        if news.everything:
            feed.reset()
        look = self._follow(feed)
        problems, looped = dict(feed.unwatched), dict[str, str]()
        for path, way in look.ways.items():
            if way.error:
                where = looped if way.error.errno == errno.ELOOP else problems
                where[path] = f"{_explained('cannot read', path, way.error)}; {_STAYS}"
        unseen = {*problems, *looped, *([self._path] if look.error else [])}
        if not self._unseen <= unseen:  # what has happened there meanwhile was told to nobody
            news.everything = True
        self._unseen = unseen
        changed: set[str] = set()
        if look.error is None:
            self._absent = False
            self._forget_missing(look.present)
            changed = await self._read(look, news, retries=retries)
        elif self._absent or not isinstance(look.error, FileNotFoundError) or self._is_overdue(self._path):
            self._absent = True
            self._missing.clear()
            what = _explained("cannot read VMIs from", self._path, look.error)
            problems[self._path] = f"{what}; those read before stay in force"
        else:
            self._missing = {self._path: self._missing[self._path]}
        self._merge(problems, looped, changed)

    async def _read(self, look: _Look, news: "_News", *, retries: bool) -> set[str]:
        """Reads the files that may have changed; returns those that have."""
        changed = set()
        stale = [path for path, way in look.ways.items() if way.is_there and self._is_stale(path, way, news, retries)]
        for path in sorted(sorted(stale, reverse=True), key=_modified):  # of equals, the first by name comes last
            before = self._files.get(path, _File())
            file = await _load_aside(path, before)
            if file.contents.entries != before.contents.entries:
                self._files.pop(path, None)
            self._files[path] = file
            if file != before:
                changed.add(path)
        return changed

    def _is_replaced(self, news: "_News") -> bool:
        """The folder, or a link on the way to it, may be another one now."""
        return not os.path.isfile(self._path) and not news.steps.keys().isdisjoint(self._root)

    def _follow(self, feed: "_Feed") -> _Look:
        """What there is; everything on the ways to it is watched when this returns, or told to be unwatched."""
        look = _look(self._path)
        for _ in range(MAX_LOOKS):
            if not feed.follow(look.folders):
                break
            look = _look(self._path)
        self._root = look.root
        return look

    def _is_stale(self, path: str, way: _Way, news: "_News", retries: bool) -> bool:
        is_unreadable = path in self._files and self._files[path].unreadable
        if news.everything or (retries and is_unreadable):
            return True
        wanted = _WRITTEN | Mask.ATTRIB if is_unreadable else _WRITTEN
        masks = [(step, news.steps[step]) for step in way.steps if step in news.steps]
        return any(mask & wanted or (mask & Mask.CREATE and _is_linked(step)) for step, mask in masks)

    def _forget_missing(self, present: Collection[str]) -> None:
        for path in [self._path, *present]:
            self._missing.pop(path, None)
        for path in self._files.keys() - present:
            if self._is_overdue(path):
                del self._files[path]

    def _is_overdue(self, path: str) -> bool:
        now = asyncio.get_running_loop().time()
        if now < self._missing.setdefault(path, now + MISSING_SECONDS):
            return False
        del self._missing[path]
        return True

    def _merge(self, problems: dict[str, str], looped: Mapping[str, str], changed: Collection[str]) -> None:
        """Make one state of all files, and report what is wrong."""
        found: list[tuple[str, int | None, str]] = [(path, None, what) for path, what in looped.items()]
        copies: dict[str, list[tuple[str, Entry]]] = {}
        for path, file in reversed(self._files.items()):
            if file.flaw and file.unreadable:
                problems[path] = file.flaw.reason
            flaws = [*([file.flaw] if file.flaw and not file.unreadable else []), *file.contents.flaws]
            found += [(path, flaw.line, flaw.reason) for flaw in flaws]
            for entry in file.contents.entries:
                copies.setdefault(entry.vmi.uid, []).append((path, entry))
            if path in changed:
                for line, kind in file.contents.ignored:
                    log.debug("object is no VMI: ignored", path=path, line=line, kind=kind)
        self._merges += 1
        self._since = self._first_of(copies.keys()) | {
            (path, uid): self._since.get((path, uid), self._merges)
            for uid, several in copies.items()
            for path, _ in several
        }
        self._state, self._owners = {}, {}
        for uid, several in copies.items():
            found += self._choose(uid, several)
        self._report(problems, sorted(found, key=lambda flaw: (flaw[0], flaw[1] or 0)), changed)

    def _first_of(self, uids: Collection[str]) -> dict[tuple[str, str], int]:
        """The first places of UIDs that are still known: a file that is missing for a while comes back to its own."""
        first: dict[str, int] = {}
        for (_, uid), merge in self._since.items():
            first[uid] = min(first.get(uid, merge), merge)
        return {key: merge for key, merge in self._since.items() if key[1] in uids and merge == first[key[1]]}

    def _choose(self, uid: str, copies: list[tuple[str, Entry]]) -> Iterator[tuple[str, int | None, str]]:
        """Decides which of the copies of a VMI counts; yields what is wrong with the others.

        Args:
            copies: the file that was written last first; each with its path.
        """
        # Of those that nothing tells apart, a backup is made after its file, and is not written again after it.
        copies.sort(key=lambda copy: self._since[copy[0], uid])
        path, first = copies.pop(newest(entry.revision for _, entry in copies))
        self._state[uid], self._owners[uid] = first.vmi, path
        for other, entry in copies:
            if path == other:
                tie = "comes first"
            elif self._since[path, uid] < self._since[other, uid]:
                tie = "was there first"
            else:
                tie = "was written last"
            why = first.revision.newer_than(entry.revision) or f"neither is newer, and it {tie}"
            which = f"{_name(entry.vmi)} has the UID {uid} that {path}:{first.line} has"
            yield other, entry.line, f"{which}; that one counts: {why}: remove the other one"

    def _report(
        self, problems: dict[str, str], flaws: list[tuple[str, int | None, str]], changed: Collection[str]
    ) -> None:
        known = self._problems | self._flaws
        now = {path if line is None else f"{path}:{line}": what for path, line, what in flaws}
        found = [*((path, None, what) for path, what in problems.items()), *flaws]
        for path, line, what in found:
            where = path if line is None else f"{path}:{line}"
            if path in changed or known.get(where) != what:
                log.error("problem with VMI files", path=path, line=line, problem=what)
        faulty = {path for path, _, _ in found}
        for path in sorted(self._faulty - faulty):
            log.info("problem with VMI files is over", path=path)
        self._problems, self._flaws, self._faulty = problems, now, faulty

    def _untold(self) -> dict[str, VMI | None]:
        batch: dict[str, VMI | None] = {uid: vmi for uid, vmi in self._state.items() if self._told.get(uid) != vmi}
        batch |= dict.fromkeys(self._told.keys() - self._state.keys())
        self._told = self._state
        return batch


@dataclass(slots=True)
class _News:
    """What inotify told: per step all that happened to it, or that everything has to be looked at again."""

    steps: dict[Step, Mask] = field(default_factory=dict)
    everything: bool = False


class _Feed:
    """Watches folders and gathers what happens in them."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._subscriptions: dict[str, tuple[Subscription, tuple[int, int]]] = {}
        self._listeners: set[asyncio.Task[None]] = set()
        self._mounts = _Mounts()
        self._news = _News(everything=True)
        self._arrived = asyncio.Event()
        self.unwatched: dict[str, str] = {}

    def follow(self, folders: Collection[str]) -> bool:
        """Watch these folders and no others; tells whether to look again at what was there before."""
        self.unwatched = {}
        for folder in self._subscriptions.keys() - folders:
            self._subscriptions.pop(folder)[0].close()
        again = False
        for folder in set(folders) - self._subscriptions.keys():
            try:
                self._subscribe(folder)
                again = True
            except OSError as error:
                again = again or isinstance(error, FileNotFoundError)  # it has vanished just now
                self.unwatched[folder] = _explained("changes are not noticed in", folder, error, _WATCH_REMEDIES)
        return again

    def _subscribe(self, folder: str) -> None:
        identity = _place(folder)  # first: whatever comes into its place later is another one
        subscription = self._watcher.watch(folder, _WATCHED | Mask.ONLYDIR)
        self._subscriptions[folder] = subscription, identity
        listener = asyncio.create_task(self._listen(folder, subscription), name=f"inotify {folder}")
        self._listeners.add(listener)
        listener.add_done_callback(self._listeners.discard)

    def reset(self) -> None:
        """Forget all watches: a folder may be another one by now than the one watched under its name."""
        for subscription, _ in self._subscriptions.values():
            subscription.close()
        self._subscriptions.clear()

    def take(self) -> _News:
        """The news since the last time; everything, the first time."""
        news, self._news = self._news, _News()
        self._arrived.clear()
        return news

    async def wait(self, deadlines: Collection[float]) -> None:
        """Wait for news, or until the loop's time is the first of `deadlines`."""
        loop, deadline = asyncio.get_running_loop(), min(deadlines, default=math.inf)
        while True:
            if self._mounts.have_changed() and any(map(self._is_another, self._subscriptions)):
                self._news.everything = True
                return
            if self._arrived.is_set() or loop.time() >= deadline:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout_at(min(deadline, loop.time() + MOUNT_SECONDS)):
                    await self._arrived.wait()

    def _is_another(self, folder: str) -> bool:
        """Something else has been mounted where a folder is watched."""
        try:
            return _place(folder) != self._subscriptions[folder][1]
        except OSError:
            return True

    async def close(self) -> None:
        self._mounts.close()
        self.reset()
        await asyncio.gather(*self._listeners)

    async def _listen(self, folder: str, subscription: Subscription) -> None:
        async for event in subscription:
            if event.overflow or event.gone or Mask.MOVE_SELF in event.mask:
                self._news.everything = True
            elif event.name is not None:
                step = (folder, event.name)
                self._news.steps[step] = self._news.steps.get(step, Mask.ZERO) | event.mask
            self._arrived.set()


class _Mounts:
    """Whether anything has been mounted or unmounted; asks no file system, whose server may never answer."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._poll = select.poll()

    def have_changed(self) -> bool:
        """Since the last time; or it is not known."""
        with suppress(OSError):
            if self._file is not None:
                return bool(self._poll.poll(0))  # proc(5), /proc/pid/mounts
            self._file = os.open("/proc/self/mounts", os.O_RDONLY | os.O_CLOEXEC)
            self._poll.register(self._file, select.POLLPRI)
        return True

    def close(self) -> None:
        """Once."""
        if self._file is not None:
            os.close(self._file)


# Reading


def _look(path: str) -> _Look:
    """What there is: the files of the folder, or the single file."""
    root, failure = _trail(path)
    try:
        if failure:
            raise failure
        if not stat.S_ISDIR(os.stat(path).st_mode):
            way = _way(path)
            if not way.is_there and not way.error:
                raise OSError(errno.EINVAL, "it is neither a folder nor a regular file")
            return _Look(root, None, {path: way})
        real = os.path.realpath(path, strict=True)
        names = [name for name in os.listdir(real) if name.endswith(SUFFIXES) and not name.startswith(".")]
    except OSError as error:
        return _Look(root, error=error)
    return _Look(root, real, {os.path.join(path, name): _way(os.path.join(real, name)) for name in names})


def _way(path: str) -> _Way:
    steps, failure = _trail(path)
    try:
        return _Way(steps, stat.S_ISREG(os.stat(path).st_mode), failure)
    except (FileNotFoundError, NotADirectoryError):
        return _Way(steps, False, failure)
    except OSError as error:
        return _Way(steps, False, error)


def _trail(path: str) -> tuple[tuple[Step, ...], OSError | None]:
    """The steps of a way, as `_Way` has them, and why a step cannot be looked at."""
    steps: list[Step] = []
    here, rest = "/", _names(path)
    while rest:
        step = (here, rest.pop())
        if step[1] == "..":
            here = os.path.dirname(here)
            continue
        try:
            link = os.readlink(os.path.join(*step))
        except (FileNotFoundError, NotADirectoryError):
            return (*steps, step), None
        except OSError as error:
            if error.errno != errno.EINVAL:
                return (*steps, step), error
            if not rest:  # it exists and is no link
                return (*steps, step), None
            here = os.path.join(*step)
            continue
        steps.append(step)
        if len(steps) > MAX_LINKS:
            break
        here = "/" if link.startswith("/") else here
        rest += _names(link)
    return tuple(steps), None


def _names(path: str) -> list[str]:
    """A path's components, last one first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _is_linked(step: Step) -> bool:
    """Whether what was created is there at once: a link or a folder, not a file that is yet to be written."""
    try:
        status = os.lstat(os.path.join(*step))
    except OSError:
        return True  # reading it tells what is wrong
    return not stat.S_ISREG(status.st_mode) or status.st_nlink > 1


def _place(path: str) -> tuple[int, int]:
    """Device and inode."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _modified(path: str) -> int:
    """When, as the file system has it; 0 where it does not say."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


async def _load_aside(path: str, before: _File) -> _File:
    """Read a file without keeping the loop: in a thread, unless that would take longer than the reading.

    On a machine whose CPUs migrations keep busy, each hand-over between threads waits for milliseconds.
    """
    with suppress(OSError):
        if os.stat(path).st_size <= SMALL_BYTES:
            return _load(path, before)
    try:
        return await asyncio.to_thread(_load, path, before)
    except RuntimeError:  # there is no thread to be had
        return _load(path, before)


def _load(path: str, before: _File) -> _File:
    """Read a file; `before` itself where nothing has changed."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return before  # to be seen missing, or back, in a moment
    except OSError as error:
        flaw = Flaw(f"{_explained('cannot read', path, error)}; {_STAYS}", None)
        return replace(before, digest=b"", flaw=flaw, unreadable=True)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    if digest == before.digest:
        return before
    from migproxy.inventory.document import read  # with a YAML parser

    try:
        if len(data) > MAX_BYTES:
            raise SyntaxFlaw(f"the file has more than {MAX_BYTES >> 20} MiB: split it", None)
        return _File(digest, read(data.decode(), before.contents))
    except UnicodeDecodeError as error:
        flaw = Flaw("the file is not UTF-8", data.count(b"\n", 0, error.start) + 1)
    except NothingInIt as error:
        kept = (
            "what was read of it before stays in force" if before.contents.entries else "it may have held VMIs before"
        )
        flaw = Flaw(f"{error.reason}; {kept}: remove it, or write 'kind: List' and 'items: []' into it", error.line)
    except SyntaxFlaw as error:
        flaw = Flaw(f"{error.reason}; what was read of the file before stays in force", error.line)
    return _File(digest, replace(before.contents, flaws=()), flaw)


# Publishing


def _publish(path: str, vmi: VMI, address: str, ports: Mapping[str, int]) -> None:
    from migproxy.inventory.document import publish  # with a YAML parser

    assert vmi.migration
    uid, migration_uid = vmi.uid, vmi.migration.migration_uid

    def edit(text: str) -> str | None:
        return publish(text, uid, migration_uid, address, ports)

    real = os.path.realpath(path)
    try:
        with _locked(os.path.dirname(real)) as folder:
            if not any(_rewrite(folder, os.path.basename(real), edit) for _ in range(PUBLISH_ATTEMPTS)):
                raise PublishError(f"{_who(vmi)}: {path} keeps changing; let its writer finish")
    except SyntaxFlaw as error:
        where = path if error.line is None else f"{path}:{error.line}"
        raise PublishError(f"{_who(vmi)}: {where} does not parse now: {error}") from error
    except UnicodeDecodeError as error:
        raise PublishError(f"{_who(vmi)}: {path} is not UTF-8") from error
    except EditError as error:
        pairs = ", ".join(f'"{port}": {channel}' for port, channel in sorted(ports.items()))
        raise PublishError(
            f"{_who(vmi)}: cannot publish in {path}: {error}. By hand, under status.migrationState:"
            f' targetNodeAddress: "{address}" and targetDirectMigrationNodePorts: {{{pairs}}}'
        ) from error
    except OSError as error:
        raise PublishError(f"{_who(vmi)}: {_explained('cannot publish in', path, error)}") from error


@contextmanager
def _locked(folder: str) -> Iterator[int]:
    """The folder's descriptor, with the lock that other daemons sharing it take too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    reason = f"another process has held the lock on its folder for {LOCK_SECONDS:.0f} s"
                    raise TimeoutError(errno.ETIMEDOUT, reason) from None
            time.sleep(0.01)
        yield descriptor
    finally:
        os.close(descriptor)


def _rewrite(folder: int, name: str, edit: Callable[[str], str | None]) -> bool:
    """Edit a file; False where somebody else changed it meanwhile."""
    with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
        before = os.fstat(file.fileno())
        text = file.read().decode()
    edited = edit(text)
    if edited is None:
        return True
    temporary = f".migproxy-{secrets.token_hex(8)}"
    try:
        _write_like(before, folder, temporary, edited.encode())
        if _identity(os.stat(name, dir_fd=folder, follow_symlinks=False)) != _identity(before):
            return False
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
    os.fsync(folder)
    return True


def _write_like(model: os.stat_result, folder: int, name: str, data: bytes) -> None:
    """Write a new file, durably, with the owner and mode of another one."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=folder), "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fchown(file.fileno(), model.st_uid, model.st_gid)
        os.fchmod(file.fileno(), stat.S_IMODE(model.st_mode))
        os.fsync(file.fileno())


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)


# Messages


_STAYS: Final = "what was read before stays in force"

_REMEDIES: Final = {
    errno.ENOENT: "create it, or give another path",
    errno.EACCES: "give the daemon's user the right to it",
    errno.EPERM: "give the daemon's user the right to it",
    errno.EMFILE: MORE_FILES,
    errno.ELOOP: "remove the symbolic link, or let it lead to a file",
    errno.EIO: "look at the node's disks (dmesg)",
    errno.ESTALE: "mount it anew",
    errno.EROFS: "use a writable folder (a ConfigMap mount never is)",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EBUSY: "mount its folder instead of the file alone",
}


_WATCH_REMEDIES: Final = _REMEDIES | {errno.ENOSPC: "raise the sysctl fs.inotify.max_user_watches"}


def _explained(what: str, path: str, error: OSError, remedies: Mapping[int, str] = _REMEDIES) -> str:
    remedy = remedies.get(error.errno or 0)
    return f"{what} {path}: {error.strerror or error}" + (f" ({remedy})" if remedy else "")


def _name(vmi: VMI) -> str:
    return f"VMI {vmi.namespace}/{vmi.name}"


def _who(vmi: VMI) -> str:
    uid = vmi.migration.migration_uid if vmi.migration else None
    return f"{_name(vmi)} (migration {uid})" if uid else _name(vmi)
