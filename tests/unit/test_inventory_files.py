"""VMIs in a folder of files: noticed at once, never lost through a slip of an editor, published in place."""

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from structlog.typing import EventDict

from migproxy.inventory import InventoryError, PublishError, files
from migproxy.inventory.files import FileInventory
from migproxy.portmap import Channel, PortMap
from migproxy.vmi import VMI
from migproxy.watch import Watcher
from tests.clock import Clock, eventually
from tests.faults import Faults, injected

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]

ADDRESS = ip_address("10.1.1.1")
PORTS = PortMap.of({Channel.LIBVIRT: 32899, Channel.DIRECT: 42691, Channel.BLOCK: 39497})
Batch = Mapping[str, VMI | None]


def document(name: str, phase: Any = "Running", **metadata: Any) -> dict[str, Any]:
    return {
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": {"name": name, "namespace": "default", "uid": f"uid-{name}"} | metadata,
        "status": {"phase": phase, "migrationState": {"migrationUid": f"m-{name}"}},
    }


def text(*names: str, phase: Any = "Running") -> str:
    return yaml.safe_dump_all([document(name, phase) for name in names])


def replace_file(path: Path, content: str) -> None:
    """As programs do it that want readers to see the old or the new file and nothing between."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(content)
    temporary.rename(path)


class Reader:
    """Iterates an inventory's changes, with bounded patience."""

    def __init__(self, inventory: FileInventory) -> None:
        self.inventory = inventory
        self.changes: AsyncGenerator[Batch, None] = inventory.changes()
        self._pending: asyncio.Task[Batch] | None = None

    async def batch(self) -> Batch:
        self._pending = self._pending or asyncio.ensure_future(anext(self.changes))
        batch = await asyncio.wait_for(self._pending, 10)
        self._pending = None
        return batch

    async def phases(self) -> dict[str, str | None]:
        """The next batch: VMI name to phase, None where it is gone."""
        return {uid.removeprefix("uid-"): vmi.phase if vmi else None for uid, vmi in (await self.batch()).items()}

    async def nothing_for(self, seconds: float) -> None:
        self._pending = self._pending or asyncio.ensure_future(anext(self.changes))
        done, _ = await asyncio.wait([self._pending], timeout=seconds)
        assert not done, f"told {self._pending.result()}"

    async def until_problems(self, *expected: str) -> None:
        """Go on until the problems are these: for each, what its place and text together contain."""
        await self._until(lambda: self.inventory.problems, expected)

    async def until_flaws(self, *expected: str) -> None:
        """Likewise, what is wrong with what files hold, and no problem."""
        await self._until(lambda: self.inventory.flaws, expected)
        assert not self.inventory.problems

    async def _until(self, told: Callable[[], Mapping[str, str]], expected: tuple[str, ...]) -> None:
        self._pending = self._pending or asyncio.ensure_future(anext(self.changes))

        def are_told() -> bool:
            found = sorted(f"{where}: {what}" for where, what in told().items())
            return len(found) == len(expected) and all(map(str.__contains__, found, sorted(expected)))

        await eventually(are_told, f"{expected} instead of {told()}", 10)

    async def close(self) -> None:
        if self._pending:
            self._pending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pending
        await self.changes.aclose()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "vmis"
    folder.mkdir()
    return folder


@pytest.fixture
async def watcher() -> AsyncIterator[Watcher]:
    async with Watcher() as watcher:
        yield watcher


@contextlib.asynccontextmanager
async def reading(watcher: Watcher, path: Path) -> AsyncIterator[Reader]:
    reader = Reader(FileInventory(str(path), watcher))
    try:
        yield reader
    finally:
        await reader.close()


# Reading


async def test_the_first_batch_is_all_there_is(watcher: Watcher, folder: Path) -> None:
    (folder / "a.yaml").write_text(text("a", "b"))
    (folder / "c.yml").write_text(text("c"))
    (folder / "d.json").write_text('{"kind": "List", "items": [' + str(document("d")).replace("'", '"') + "]}")
    for other in (".hidden.yaml", "notes.txt", "a.yaml~", "#a.yaml#", ".a.yaml.swp"):
        (folder / other).write_text(text("ignored"))
    (folder / "folder.yaml").mkdir()
    async with reading(watcher, folder) as reader:
        assert await reader.phases() == dict.fromkeys("abcd", "Running")
        assert not reader.inventory.problems


async def test_an_empty_folder_is_synchronised_too(watcher: Watcher, folder: Path) -> None:
    async with reading(watcher, folder) as reader:
        assert await reader.batch() == {}


async def test_a_single_file_of_any_name(watcher: Watcher, tmp_path: Path) -> None:
    file = tmp_path / "vmi.txt"
    file.write_text(text("a"))
    async with reading(watcher, file) as reader:
        assert await reader.phases() == {"a": "Running"}
        file.write_text(text("b"))
        assert await reader.phases() == {"a": None, "b": "Running"}
        replace_file(file, text("c"))
        assert await reader.phases() == {"b": None, "c": "Running"}
        file.unlink()
        await reader.until_problems("No such file")
        replace_file(file, text("c", "d"))
        assert await reader.phases() == {"d": "Running"}
        await reader.until_problems()


async def test_a_single_file_is_followed_when_its_folder_is_replaced(watcher: Watcher, folder: Path) -> None:
    for path, content in ((folder, text("a")), (folder.with_name("second"), text("b"))):
        path.mkdir(exist_ok=True)
        (path / "vmi.yaml").write_text(content)
    async with reading(watcher, folder / "vmi.yaml") as reader:
        await reader.batch()
        folder.rename(folder.with_name("away"))
        folder.with_name("second").rename(folder)
        assert await reader.phases() == {"a": None, "b": "Running"}
        (folder / "vmi.yaml").write_text(text("c"))
        assert await reader.phases() == {"b": None, "c": "Running"}


async def test_each_kind_of_change_is_told_once(watcher: Watcher, folder: Path, clock: Clock) -> None:
    async with reading(watcher, folder) as reader:
        await reader.batch()
        (folder / "a.yaml").write_text(text("a"))
        assert await reader.phases() == {"a": "Running"}
        (folder / "a.yaml").write_text(text("a", phase="Failed"))
        assert await reader.phases() == {"a": "Failed"}
        replace_file(folder / "a.yaml", text("a", "b"))
        assert await reader.phases() == {"a": "Running", "b": "Running"}
        (folder / "a.yaml").rename(folder / "renamed.json")
        (folder / "link.yaml").symlink_to(folder / "new")
        (folder / "new").write_text(text("c"))
        assert await reader.phases() == {"c": "Running"}
        assert clock() == 0
        os.link(folder / "new", folder / "hard.yml")
        (folder / "link.yaml").unlink()
        (folder / "renamed.json").unlink()
        assert await reader.phases() == {"a": None, "b": None}
        (folder / "hard.yml").unlink()
        assert await reader.phases() == {"c": None}
        assert clock() == 2 * files.MISSING_SECONDS


async def test_what_changes_nothing_that_we_read_is_not_told(watcher: Watcher, folder: Path) -> None:
    (folder / "a.yaml").write_text(text("a"))
    async with reading(watcher, folder) as reader:
        await reader.batch()
        (folder / "a.yaml").write_text("# a comment\n" + text("a"))
        os.utime(folder / "a.yaml")
        (folder / "a.yaml").chmod(0o600)
        (folder / "b.yaml").write_text(text("b"))
        assert await reader.phases() == {"b": "Running"}


async def test_a_file_is_not_read_while_it_is_written(watcher: Watcher, folder: Path) -> None:
    (folder / "a.yaml").write_text(text("a"))
    async with reading(watcher, folder) as reader:
        await reader.batch()
        with (folder / "a.yaml").open("w") as old, (folder / "b.yaml").open("w") as new:
            for file in (old, new):
                file.write(text("x"))
                file.flush()
            (folder / "other.yaml").write_text(text("other"))
            assert await reader.phases() == {"other": "Running"}
            old.write("---\n" + text("a"))
        changes: dict[str, str | None] = {}
        while changes != {"x": "Running"}:
            changes |= await reader.phases()
        await reader.until_flaws("b.yaml:1: VMI default/x has the UID uid-x that")


async def test_an_editor_that_renames_the_old_file_away_loses_no_vmi(watcher: Watcher, folder: Path) -> None:
    file = folder / "a.yaml"
    file.write_text(text("a"))
    async with reading(watcher, folder) as reader:
        await reader.batch()
        file.rename(folder / "a.yaml~")  # vim's way, for which it takes a few milliseconds
        await reader.nothing_for(files.MISSING_SECONDS - 0.001)
        with file.open("w") as new:
            new.write("kind: VirtualMachineInstance\n")
            new.flush()
            await reader.nothing_for(60)
            assert not reader.inventory.problems
            new.seek(0)
            new.write(text("a", phase="Succeeded"))
        (folder / "a.yaml~").unlink()
        assert await reader.phases() == {"a": "Succeeded"}


async def test_a_configmap_is_followed_through_its_links(watcher: Watcher, folder: Path) -> None:
    def swap(version: str, content: str) -> None:
        (folder / f"..{version}").mkdir()
        (folder / f"..{version}" / "vmis.yaml").write_text(content)
        (folder / "..data_tmp").symlink_to(f"..{version}")
        (folder / "..data_tmp").rename(folder / "..data")

    swap("1", text("a"))
    (folder / "vmis.yaml").symlink_to("..data/vmis.yaml")
    for path in (folder, folder / "vmis.yaml"):
        async with reading(watcher, path) as reader:
            assert await reader.phases() == {"a": "Running"}
            swap(f"2-{path.name}", text("a", phase="Failed"))
            assert await reader.phases() == {"a": "Failed"}
            shutil.rmtree(folder / "..1", ignore_errors=True)
            swap(f"3-{path.name}", text("a"))
            assert await reader.phases() == {"a": "Running"}
            assert not reader.inventory.problems


async def test_links_out_of_the_folder_are_followed(watcher: Watcher, folder: Path, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "real"
    real.parent.mkdir()
    real.write_text(text("a"))
    (folder / "a.yaml").symlink_to("../elsewhere/real")
    (tmp_path / "to-folder").symlink_to("vmis")
    async with reading(watcher, tmp_path / "to-folder") as reader:
        assert await reader.phases() == {"a": "Running"}
        real.write_text(text("b"))
        assert await reader.phases() == {"a": None, "b": "Running"}
        shutil.copytree(folder, tmp_path / "second", symlinks=True)
        (tmp_path / "second" / "c.yaml").write_text(text("c"))
        (tmp_path / "link").symlink_to("second")
        (tmp_path / "link").rename(tmp_path / "to-folder")
        assert await reader.phases() == {"c": "Running"}
        real.write_text(text("b", phase="Failed"))
        assert await reader.phases() == {"b": "Failed"}
        real.unlink()
        assert await reader.phases() == {"b": None}


async def test_links_in_a_circle_are_a_flaw_and_no_problem(watcher: Watcher, folder: Path) -> None:
    file, other = folder / "a.yaml", folder / "b.yaml"
    file.write_text(text("a"))
    (folder / "c.yaml").write_text(text("c"))
    async with reading(watcher, folder) as reader:
        assert await reader.phases() == {"a": "Running", "c": "Running"}
        file.unlink()
        file.symlink_to("b.yaml")
        other.symlink_to("a.yaml")
        loop = "Too many levels of symbolic links (remove the symbolic link, or let it lead to a file); what was read"
        await reader.until_flaws(f"{file}: cannot read {file}: {loop}", f"{other}: cannot read {other}: {loop}")
        await reader.nothing_for(1)
        replace_file(file, text("a", phase="Failed"))
        assert await reader.phases() == {"a": "Failed"}


@pytest.mark.parametrize("vanish", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("away"))])
async def test_a_folder_that_vanishes_keeps_its_vmis_and_is_found_again(
    watcher: Watcher, folder: Path, logs: list[EventDict], vanish: Callable[[Path], Any]
) -> None:
    (folder / "a.yaml").write_text(text("a"))
    async with reading(watcher, folder) as reader:
        await reader.batch()
        vanish(folder)
        await reader.until_problems(f"{folder}: cannot read VMIs from {folder}: No such file")
        folder.mkdir()
        replace_file(folder / "a.yaml", text("a"))
        replace_file(folder / "b.yaml", text("b"))
        assert await reader.phases() == {"b": "Running"}
        assert not reader.inventory.problems
        (folder / "c.yaml").write_text(text("c"))
        assert await reader.phases() == {"c": "Running"}
    assert [(log["log_level"], log["path"]) for log in logs] == [("error", str(folder)), ("info", str(folder))]


async def test_a_folder_put_in_the_place_of_another_is_the_one_followed(watcher: Watcher, folder: Path) -> None:
    (folder / "a.yaml").write_text(text("a"))
    second = folder.with_name("second")
    second.mkdir()
    (second / "b.yaml").write_text(text("b"))
    async with reading(watcher, folder) as reader:
        await reader.batch()
        folder.rename(folder.with_name("away"))
        second.rename(folder)
        changes = await reader.phases()
        while changes != {"a": None, "b": "Running"}:
            changes |= await reader.phases()
        (folder.with_name("away") / "x.yaml").write_text(text("x"))
        (folder / "c.yaml").write_text(text("c"))
        assert await reader.phases() == {"c": "Running"}


async def test_a_missing_parent_is_watched_for(watcher: Watcher, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "vmis"
    folder.mkdir(parents=True)
    async with reading(watcher, folder) as reader:
        await reader.batch()
        shutil.rmtree(tmp_path / "a")
        await reader.until_problems("cannot read VMIs from")
        folder.mkdir(parents=True)
        (folder / "a.yaml").write_text(text("a"))
        assert await reader.phases() == {"a": "Running"}


async def test_a_lost_event_is_made_up_for(watcher: Watcher, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migproxy.watch.QUEUE_LIMIT", 10)
    async with reading(watcher, folder) as reader:
        await reader.batch()
        for number in range(20):
            (folder / f"{number}.yaml").write_text(text(f"{number}"))
        changes: dict[str, str | None] = {}
        while len(changes) < 20:
            changes |= await reader.phases()


@pytest.mark.parametrize("missing", [True, False])
async def test_what_cannot_be_read_at_the_start_is_named(watcher: Watcher, folder: Path, missing: bool) -> None:
    path = folder / "no-such" if missing else folder / "fifo"
    if not missing:
        os.mkfifo(path)
    with pytest.raises(InventoryError, match=f"cannot read VMIs from {path}: "):
        FileInventory(str(path), watcher)


# Without the rights of root, which root can give up only for good.
UNPRIVILEGED = """
    import asyncio, os, sys
    from migproxy.inventory import InventoryError
    from migproxy.inventory.files import FileInventory
    from migproxy.watch import Watcher

    async def main(folder):
        async with Watcher() as watcher:
            os.chmod(folder, 0)
            try:
                FileInventory(folder, watcher)
            except InventoryError as error:
                print(error)
            os.chmod(folder, 0o700)
            inventory = FileInventory(folder, watcher)
            changes = inventory.changes()
            print(sorted(await anext(changes)), *inventory.problems.values())
            following = asyncio.ensure_future(anext(changes))
            os.chmod(folder + "/closed.yaml", 0o600)
            print(sorted(await asyncio.wait_for(following, 10)), *inventory.problems.values())
            following = asyncio.ensure_future(anext(changes))
            os.chmod(folder, 0)
            while not inventory.problems:
                await asyncio.sleep(0.01)
            print(*inventory.problems.values())
            os.chmod(folder, 0o700)
            open(folder + "/new.yaml", "w").write(open(folder + "/open.yaml").read().replace("open", "new"))
            print(sorted(await asyncio.wait_for(following, 10)), *inventory.problems.values())
            following.cancel()
            await changes.aclose()

    asyncio.run(main(sys.argv[1]))
"""


def test_a_lack_of_rights_is_named_and_its_end_is_noticed(folder: Path) -> None:
    (folder / "open.yaml").write_text(text("open"))
    (folder / "closed.yaml").write_text(text("closed"))
    (folder / "closed.yaml").chmod(0)
    plain = [sys.executable, "-c", textwrap.dedent(UNPRIVILEGED), str(folder)]
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    command = [*drop, *plain] if os.geteuid() == 0 else plain
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    output = [line for line in run.stdout.splitlines() if "VMI files" not in line]
    remedy = "Permission denied (give the daemon's user the right to it)"
    kept = f"{remedy}; what was read before stays in force"
    assert output == [
        f"cannot read VMIs from {folder}: {remedy}",
        f"['uid-open'] cannot read {folder}/closed.yaml: {kept}",
        "['uid-closed']",
        f"cannot read VMIs from {folder}: {remedy}; those read before stay in force",
        "['uid-new']",
    ]


# Problems


async def test_a_file_that_does_not_parse_keeps_its_last_good_state(
    watcher: Watcher, folder: Path, logs: list[EventDict]
) -> None:
    good, file = text("a", "b"), folder / "a.yaml"
    file.write_text(good)
    async with reading(watcher, folder) as reader:
        await reader.batch()
        file.write_text(good + "  x: [")
        (folder / "c.yaml").write_text(text("c"))
        assert await reader.phases() == {"c": "Running"}
        await reader.until_flaws(f"{file}:{good.count(chr(10)) + 1}: ")
        file.write_text("\n" + good + "  x: [")
        await reader.until_flaws(f"{file}:{good.count(chr(10)) + 2}: ")
        file.write_bytes(b"a: 1\nb: \xff\n")
        await reader.until_flaws(f"{file}:2: the file is not UTF-8")
        file.write_text(text("a"))
        assert await reader.phases() == {"b": None}
        assert not reader.inventory.flaws
    told = [(log["log_level"], log["path"], log.get("line")) for log in logs if log["log_level"] != "debug"]
    lines = [good.count("\n") + 1, good.count("\n") + 2, 2]
    assert told == [*(("error", str(file), line) for line in lines), ("info", str(file), None)]


async def test_one_bad_vmi_does_not_hold_up_the_others(watcher: Watcher, folder: Path, logs: list[EventDict]) -> None:
    file = folder / "a.yaml"
    file.write_text(text("a", "b"))
    async with reading(watcher, folder) as reader:
        await reader.batch()
        bad = yaml.safe_dump_all([document("a", ["no string"]), document("b", "Failed"), document("c")])
        file.write_text(bad)
        assert await reader.phases() == {"b": "Failed", "c": "Running"}
        await reader.until_flaws(f"{file}:1: VMI default/a: status.phase")
        file.write_text(bad + "# once more\n")
        file.write_text(text("a", "b", phase="Failed"))
        assert await reader.phases() == {"a": "Failed", "c": None}
        assert not reader.inventory.flaws
    errors = [log for log in logs if log["log_level"] == "error"]
    assert {(log["path"], log["line"]) for log in errors} == {(str(file), 1)}


@pytest.mark.parametrize("empty", ["", " \n", "# nothing\n", "---\n", "null\n"])
async def test_a_file_that_turns_empty_ends_nothing_until_an_empty_list_says_so(
    watcher: Watcher, folder: Path, logs: list[EventDict], empty: str
) -> None:
    file = folder / "a.yaml"
    file.write_text(text("a"))
    async with reading(watcher, folder) as reader:
        await reader.batch()
        file.write_text(empty)
        await reader.nothing_for(10)
        await reader.until_flaws(f"{file}: the file is empty; what was read of it before stays in force: remove it, or")
        assert reader.inventory.may_hide("uid-a")
        file.write_text("kind: List\nitems: []\n")
        assert await reader.phases() == {"a": None}
        assert not reader.inventory.flaws
    assert [(log["log_level"], log["path"]) for log in logs] == [("error", str(file)), ("info", str(file))]


@pytest.mark.parametrize("then", [Path.unlink, lambda file: file.write_text("kind: Pod\n")])
async def test_an_empty_file_ends_its_vmis_once_it_is_removed_or_holds_something_else(
    watcher: Watcher, folder: Path, then: Callable[[Path], Any]
) -> None:
    file = folder / "a.yaml"
    file.write_text(text("a"))
    async with reading(watcher, folder) as reader:
        await reader.batch()
        file.write_text("")
        await reader.until_flaws("the file is empty")
        then(file)
        assert await reader.phases() == {"a": None}
        assert not reader.inventory.flaws


async def test_a_file_that_is_empty_from_the_start_may_hide_any_vmi(watcher: Watcher, folder: Path) -> None:
    (folder / "a.yaml").write_text("")
    async with reading(watcher, folder) as reader:
        assert await reader.batch() == {}
        await reader.until_flaws("the file is empty; it may have held VMIs before: remove it, or write 'kind: List'")
        assert reader.inventory.may_hide("uid-a")


def copy(phase: str, **metadata: Any) -> str:
    """One state of VMI x."""
    return yaml.safe_dump(document("x", phase, **metadata))


async def test_of_equal_copies_the_one_that_was_there_first_counts_and_is_published_into(
    watcher: Watcher, folder: Path, logs: list[EventDict]
) -> None:
    first, second = folder / "vm1.yaml", folder / "vm1-backup.yaml"  # the copy is the first by name
    async with reading(watcher, folder) as reader:
        await reader.batch()
        first.write_text(copy("Running", resourceVersion="7"))
        vmi = (await reader.batch())["uid-x"]
        assert vmi
        second.write_text(first.read_text())
        which = (
            f"{second}:1: VMI default/x has the UID uid-x that {first}:1 has; that one counts: neither is newer, and"
        )
        await reader.until_flaws(which)
        await reader.inventory.publish(vmi, ADDRESS, PORTS)
        assert set(await reader.batch()) == {"uid-x"}
        assert "targetNodeAddress" in first.read_text()
        assert "targetNodeAddress" not in second.read_text()
        first.write_text(copy("Failed", resourceVersion="7"))
        assert await reader.phases() == {"x": "Failed"}
        await reader.until_flaws(which)
        first.unlink()
        assert await reader.phases() == {"x": "Running"}
        assert not reader.inventory.flaws
    assert [(log["log_level"], log["path"]) for log in logs] == [("error", str(second)), ("info", str(second))]


async def test_an_original_that_was_missing_for_a_while_counts_again(watcher: Watcher, folder: Path) -> None:
    original, backup = folder / "vm1.yaml", folder / "vm1-backup.yaml"
    async with reading(watcher, folder) as reader:
        await reader.batch()
        original.write_text(copy("Running"))
        await reader.batch()
        backup.write_text(copy("as backed up"))
        await reader.until_flaws(f"{backup}:1: ")
        original.unlink()
        assert await reader.phases() == {"x": "as backed up"}
        original.write_text(copy("Failed"))
        assert await reader.phases() == {"x": "Failed"}
        await reader.until_flaws(f"{backup}:1: VMI default/x has the UID uid-x that {original}:1 has; that one counts")


async def test_the_newer_of_two_copies_counts_and_is_published_into(watcher: Watcher, folder: Path) -> None:
    old, new = folder / "a.yaml", folder / "b.yaml"
    old.write_text(copy("old", resourceVersion="999", generation=1))
    async with reading(watcher, folder) as reader:
        await reader.batch()
        new.write_text(copy("new", resourceVersion="1000", generation=1))
        vmi = (await reader.batch())["uid-x"]
        assert vmi
        assert vmi.phase == "new"
        await reader.until_flaws(f"{old}:1: VMI default/x has the UID uid-x that {new}:1 has; that one counts: its res")
        await reader.inventory.publish(vmi, ADDRESS, PORTS)
        await reader.batch()
        assert "targetNodeAddress" in new.read_text()
        old.write_text(copy("newest", resourceVersion="1000", generation=2))
        assert await reader.phases() == {"x": "newest"}
        await reader.until_flaws(f"{new}:1: VMI default/x has the UID uid-x that {old}:1 has; that one counts: its gen")
        new.write_text(copy("as old", resourceVersion="1000", generation=2))
        await reader.until_flaws(f"{new}:1: VMI default/x has the UID uid-x that {old}:1 has; that one counts: neither")
        new.write_text(copy("newest", resourceVersion="1001"))
        await reader.until_flaws(f"{old}:1: ")
        await reader.nothing_for(1)  # a version alone is no news


async def test_of_copies_that_were_there_at_the_start_the_one_that_was_written_last_counts(
    watcher: Watcher, folder: Path
) -> None:
    paths = {name: folder / f"{name}.yaml" for name in "abcd"}
    for name, seconds in (("a", 1000), ("b", 2000), ("c", 1000)):
        paths[name].write_text(copy(f"of {name}"))
        os.utime(paths[name], (seconds, seconds))
    async with reading(watcher, folder) as reader:
        assert await reader.phases() == {"x": "of b"}
        paths["d"].write_text(copy("of d"))  # is not one of them
        paths["b"].unlink()
        assert await reader.phases() == {"x": "of a"}
        paths["c"].write_text(copy("of c, edited"))
        os.utime(paths["c"], (500, 500))  # whatever the file system's clock says
        assert await reader.phases() == {"x": "of c, edited"}
        which = (
            f"VMI default/x has the UID uid-x that {paths['c']}:1 has; that one counts: neither is newer, and it was"
        )
        await reader.until_flaws(f"{paths['a']}:1: {which} written last", f"{paths['d']}:1: {which} there first")


async def test_an_error_of_all_copies_does_not_change_which_one_counts(
    watcher: Watcher, folder: Path, tmp_path: Path
) -> None:
    for name, seconds in (("a", 2000), ("b", 1000)):
        (folder / f"{name}.yaml").write_text(copy(f"of {name}"))
        os.utime(folder / f"{name}.yaml", (seconds, seconds))
    faults = Faults(tmp_path / "faults")
    async with reading(watcher, folder) as reader:
        assert await reader.phases() == {"x": "of a"}
        with injected(faults), faults.failing("open", errno.EIO, folder):
            for name in "ab":
                os.rename(folder / f"{name}.yaml", folder / f".{name}")
                os.rename(folder / f".{name}", folder / f"{name}.yaml")
            await reader.until_problems("a.yaml", "b.yaml")
        (folder / "b.yaml").touch()
        await reader.nothing_for(5)
        assert not reader.inventory.problems


async def test_within_one_file_the_newest_copy_counts(watcher: Watcher, folder: Path) -> None:
    file = folder / "a.yaml"
    file.write_text("---\n".join(copy(f"of {version}", resourceVersion=version) for version in ("9", "11", "10")))
    async with reading(watcher, folder) as reader:
        assert await reader.phases() == {"x": "of 11"}
        await reader.until_flaws(f"{file}:1: ", f"{file}:25: ")


async def test_objects_of_other_kinds_are_only_a_debug_line(
    watcher: Watcher, folder: Path, logs: list[EventDict]
) -> None:
    (folder / "a.yaml").write_text("kind: Pod\n---\n" + text("a"))
    async with reading(watcher, folder) as reader:
        assert await reader.phases() == {"a": "Running"}
    assert [(log["log_level"], log["line"], log["kind"]) for log in logs] == [("debug", 1, "Pod")]


async def test_a_folder_that_cannot_be_watched_is_a_problem(
    watcher: Watcher, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (folder / "a.yaml").write_text(text("a"))
    monkeypatch.setattr(watcher, "watch", refuse)
    async with reading(watcher, folder) as reader:
        assert await reader.phases() == {"a": "Running"}
        assert "fs.inotify.max_user_watches" in reader.inventory.problems[str(folder)]


async def test_a_large_file_is_read_while_the_loop_goes_on(watcher: Watcher, folder: Path) -> None:
    vmi = document("name", annotations={f"example.com/{number}": "x" * 100 for number in range(45)})
    template = yaml.safe_dump(vmi)
    everything = "---\n".join(
        template.replace("name: name", f"name: n{n}").replace("uid-name", f"u{n}") for n in range(1000)
    )
    assert len(everything) > 5_000_000
    (folder / "all.yaml").write_text(everything)
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    taking = asyncio.create_task(take_turns())
    async with reading(watcher, folder) as reader:
        assert len(await reader.batch()) == 1000
    taking.cancel()
    assert turns > 100  # on the loop itself, it would be a dozen


# Publishing


async def publish(reader: Reader, name: str, **changes: Any) -> VMI:
    """Publish for a VMI of the first batch."""
    vmi = (await reader.batch())[f"uid-{name}"]
    assert vmi
    await reader.inventory.publish(vmi, ADDRESS, PORTS)
    return vmi


async def test_publishing_writes_the_vmis_file_and_is_told_once(watcher: Watcher, folder: Path) -> None:
    file = folder / "a.yaml"
    file.write_text("# mine\n" + text("a", "b"))
    file.chmod(0o640)
    before = file.read_text()
    async with reading(watcher, folder) as reader:
        await publish(reader, "b")
        batch = await reader.batch()
        (vmi,) = batch.values()
        assert vmi
        assert vmi.migration
        assert vmi.migration.target_node_address == "10.1.1.1"
        assert vmi.migration.target_ports == {"32899": 0, "42691": 49152, "39497": 49153}
        lines = before.splitlines()
        assert [line for line in file.read_text().splitlines() if line in lines] == lines
        assert file.stat().st_mode & 0o777 == 0o640
        written = file.stat()
        await reader.inventory.publish(vmi, ADDRESS, PORTS)
        assert file.stat() == written
        await reader.nothing_for(60)
        assert os.listdir(folder) == ["a.yaml"]


async def test_a_link_stays_a_link(watcher: Watcher, folder: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_text(text("a"))
    (folder / "a.yaml").symlink_to(real)
    async with reading(watcher, folder) as reader:
        await publish(reader, "a")
        assert set(await reader.batch()) == {"uid-a"}
        assert (folder / "a.yaml").readlink() == real
        assert "targetNodeAddress: 10.1.1.1" in real.read_text()


async def test_several_daemons_publish_into_one_file(watcher: Watcher, folder: Path) -> None:
    names = [f"v{number}" for number in range(20)]
    (folder / "all.yaml").write_text(text(*names))
    async with reading(watcher, folder) as one, reading(watcher, folder) as other:
        vmis = await one.batch()
        await other.batch()
        publishing = []
        for number, name in enumerate(names):
            vmi = vmis[f"uid-{name}"]
            assert vmi
            publishing.append((one, other)[number % 2].inventory.publish(vmi, ADDRESS, PORTS))
        await asyncio.gather(*publishing)
        assert (folder / "all.yaml").read_text().count("targetNodeAddress: 10.1.1.1") == len(names)


async def test_an_editor_that_comes_between_is_not_overwritten(
    watcher: Watcher, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "a.yaml"
    file.write_text(text("a"))
    write, edits = files._write_like, iter(["# one\n", "# two\n"])

    def write_after_editor(*arguments: Any) -> None:
        if edit := next(edits, None):
            file.write_text(edit + file.read_text())
        write(*arguments)

    monkeypatch.setattr(files, "_write_like", write_after_editor)
    async with reading(watcher, folder) as reader:
        await publish(reader, "a")
        assert file.read_text().startswith("# two\n# one\n")
        assert "targetNodeAddress" in file.read_text()
        assert os.listdir(folder) == ["a.yaml"]


async def test_a_file_that_never_rests_is_given_up(
    watcher: Watcher, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.yaml").write_text(text("a"))
    write = files._write_like

    def write_after_editor(*arguments: Any) -> None:
        (folder / "a.yaml").write_text("#\n" + (folder / "a.yaml").read_text())
        write(*arguments)

    monkeypatch.setattr(files, "_write_like", write_after_editor)
    async with reading(watcher, folder) as reader:
        with pytest.raises(PublishError, match=r"default/a \(migration m-a\): .*a.yaml keeps changing"):
            await publish(reader, "a")


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (text("b"), "no VMI with the UID uid-a"),
        (text("a").replace("m-a", "m-next"), "the VMI's migration is m-next now"),
        (text("a") + "x: [", r"a\.yaml:\d+ does not parse now"),
        (
            text("a").replace("migrationUid: m-a", "targetNodeAddress: |\n      x\n    migrationUid: m-a"),
            r'By hand, under status\.migrationState: targetNodeAddress: "10\.1\.1\.1" and .*Ports: \{"32899": 0, ',
        ),
        (None, r"No such file"),
    ],
)
async def test_what_cannot_be_published_says_why(watcher: Watcher, folder: Path, now: str | None, reason: str) -> None:
    file = folder / "a.yaml"
    file.write_text(text("a"))
    async with reading(watcher, folder) as reader:
        vmi = (await reader.batch())["uid-a"]
        assert vmi
        if now is None:
            file.unlink()
        else:
            file.write_text(now)
        with pytest.raises(PublishError, match=reason) as caught:
            await reader.inventory.publish(vmi, ADDRESS, PORTS)
        assert str(caught.value).startswith("VMI default/a (migration m-a): ")
        assert os.listdir(folder) == ([] if now is None else ["a.yaml"])
        assert now is None or file.read_text() == now


async def test_a_vmi_without_a_migration_is_not_published_to(watcher: Watcher, folder: Path) -> None:
    (folder / "a.yaml").write_text(yaml.safe_dump(document("a") | {"status": {}}))
    async with reading(watcher, folder) as reader:
        with pytest.raises(PublishError, match="it has no status"):
            await publish(reader, "a")


async def test_a_lock_that_is_never_given_back_is_an_error(
    watcher: Watcher, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.05)
    (folder / "a.yaml").write_text(text("a"))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        async with reading(watcher, folder) as reader:
            with pytest.raises(PublishError, match="another process has held the lock"):
                await publish(reader, "a")
    finally:
        os.close(descriptor)
