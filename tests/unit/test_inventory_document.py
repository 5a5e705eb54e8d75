"""Finding VMIs in a file's text, and publishing into it without changing anything else."""

import difflib
import json
import textwrap
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from migproxy.inventory import document
from migproxy.inventory.contents import EMPTY, EditError, Flaw, NothingInIt, Revision, SyntaxFlaw, newest
from migproxy.inventory.document import publish, read

pytestmark = pytest.mark.tier("gate")

PORTS = {"32899": 0, "39497": 49153, "42691": 49152}
HEAD = "apiVersion: kubevirt.io/v1\nkind: VirtualMachineInstance\nmetadata: {name: vm, uid: u-1}\n"


def vmi(name: str = "vm", uid: str | None = "u-1", **status: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default"} | ({"uid": uid} if uid else {})
    return {"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "metadata": metadata, "status": status}


def names(text: str) -> list[tuple[str, int]]:
    contents = read(text, EMPTY)
    assert not contents.flaws
    return [(entry.vmi.name, entry.line) for entry in contents.entries]


def published(text: str, address: str = "10.1.1.1", ports: dict[str, int] = PORTS) -> str:
    """Publish, and check what holds of every edit."""
    edited = publish(text, "u-1", "m-1", address, ports)
    assert edited is not None
    assert publish(edited, "u-1", "m-1", address, ports) is None
    (entry,) = [entry for entry in read(edited, EMPTY).entries if entry.vmi.uid == "u-1"]
    assert entry.vmi.migration
    assert entry.vmi.migration.target_node_address == address
    assert entry.vmi.migration.target_ports == ports
    return edited


def difference(before: str, after: str) -> list[str]:
    """The lines that went and came, line ends included."""
    lines = difflib.ndiff(before.splitlines(keepends=True), after.splitlines(keepends=True))
    return [line for line in lines if line[0] in "+-"]


def yaml_vmi(state: str, *, before: str = "", after: str = "") -> str:
    """A VMI in block style whose migrationState has these lines."""
    return before + HEAD + "status:\n  migrationState:\n" + textwrap.indent(state, "    ") + after


# Finding


def test_what_kubectl_prints_for_one_and_for_many() -> None:
    one = yaml.safe_dump(vmi("a"))
    many = {"apiVersion": "v1", "kind": "List", "items": [vmi("a", "1"), vmi("b", "2")]}
    assert names(one) == [("a", 1)]
    assert names(yaml.safe_dump(many)) == [("a", 3), ("b", 10)]
    assert names(json.dumps(many, indent=4)) == [("a", 5), ("b", 15)]


def test_the_items_of_a_list_from_the_api_do_not_say_their_kind() -> None:
    items = [{key: value for key, value in vmi("a").items() if key not in ("kind", "apiVersion")}]
    assert names(json.dumps({"kind": "VirtualMachineInstanceList", "items": items})) == [("a", 1)]


def test_documents_of_other_kinds_and_empty_ones_are_passed_over() -> None:
    text = (
        f"---\n---\n# nothing\n---\nkind: Pod\nmetadata: {{}}\n---\n{yaml.safe_dump(vmi('a'))}---\nkind: List\nitems:\n"
    )
    contents = read(text, EMPTY)
    assert [entry.vmi.name for entry in contents.entries] == ["a"]
    assert not contents.flaws
    assert contents.ignored == ((5, "Pod"),)


@pytest.mark.parametrize("text", ["just text", "- a\n- b\n", "metadata: {name: a}\n"])
def test_what_is_no_kubernetes_object_is_a_flaw(text: str) -> None:
    assert read(text, EMPTY).flaws == (Flaw("this is no Kubernetes object: it has no kind", 1),)


@pytest.mark.parametrize("empty", ["", " \n", "# nothing\n", "---\n", "null\n", "---\n---\n# nothing\n", "\ufeff"])
def test_an_empty_file_is_no_empty_list(empty: str) -> None:
    with pytest.raises(NothingInIt):
        read(empty, EMPTY)


@pytest.mark.parametrize("nothing", ["kind: List\nitems: []\n", '{"kind": "VirtualMachineInstanceList", "items": []}'])
def test_an_empty_list_says_that_there_is_nothing(nothing: str) -> None:
    assert read(nothing, read(yaml.safe_dump(vmi()), EMPTY)) == EMPTY


def test_what_is_cut_off_may_be_any_of_the_vmis_before() -> None:
    many = yaml.safe_dump({"apiVersion": "v1", "items": [vmi("a", "1"), vmi("b", "2")], "kind": "List"})
    before = read(many, EMPTY)
    cuts = [many[: many.index("kind: List")], many[: many.index("- apiVersion")], "kind: VirtualMachineInstance\n"]
    for text in cuts:
        contents = read(text, before)
        assert contents.entries == before.entries
        (flaw,) = contents.flaws
        assert flaw.reason.endswith("; VMIs that the file held before stay in force")
    one = yaml.safe_dump(vmi("a", "1", phase="Failed")) + "---\nkind: VirtualMachineInstance\n"
    assert [(entry.vmi.name, entry.vmi.phase) for entry in read(one, before).entries] == [("a", "Failed"), ("b", None)]


RUNNING = vmi(
    "vm1",
    "6a1a24a1-4061-4607-8bf4-a3963d0c5895",
    activePods={"6a1a24a1-4061-4607-8bf4-a3963d0c5896": "node-1"},
    migrationMethod="BlockMigration",
    migrationState={"migrationUid": "m-1", "sourceNode": "node-1", "startTimestamp": "2026-01-01T00:00:00Z"},
    nodeName="node-1",
) | {"spec": {"evictionStrategy": "LiveMigrate", "volumes": [{"name": "root"}]}}
RUNNING["metadata"]["namespace"] = "prod"


@pytest.mark.parametrize(
    "text",
    [
        yaml.safe_dump(RUNNING),
        yaml.safe_dump({"apiVersion": "v1", "items": [RUNNING, vmi("b", "2")], "kind": "List", "metadata": {}}),
    ],
)
def test_a_running_migration_outlives_a_cut_at_any_place(text: str) -> None:
    before = read(text, EMPTY)
    (running,) = [entry.vmi for entry in before.entries if entry.vmi.name == "vm1"]
    for place in range(text.index("node-1", text.index("nodeName")) + len("node-1")):
        try:
            cut = read(text[:place], before)
        except SyntaxFlaw:
            continue  # everything stays in force
        assert running in [entry.vmi for entry in cut.entries], text[:place]
        assert cut.flaws, text[:place]


@pytest.mark.parametrize(
    ("last", "lost"),
    [
        ("kind: Virtual", "its kind is 'Virtual', and it has no name; VMIs that the file held before stay in force"),
        ("name: vm1", "metadata.uid is missing; VMIs that the file held before stay in force"),
        ("uid: 6a1a24a1", "VMI prod/vm1 has lost a part of metadata.uid, and migration m-1 is not over"),
        ("evictionStrategy: Live", "VMI prod/vm1 has lost status.migrationState, and migration m-1 is not over"),
        ("migrationUid: m", "VMI prod/vm1 has lost status.nodeName, and migration m-1 is not over"),
    ],
)
def test_a_cut_is_seen_too_where_files_never_end_in_a_line_break(last: str, lost: str) -> None:
    text = yaml.safe_dump(RUNNING).rstrip()
    before = read(text, EMPTY)
    cut = read(text[: text.index(last) + len(last)], before)
    assert cut.entries == before.entries
    (flaw,) = cut.flaws
    assert lost in flaw.reason


def test_a_file_that_loses_the_end_of_its_last_line_is_cut_off() -> None:
    text = yaml.safe_dump(RUNNING)
    with pytest.raises(SyntaxFlaw, match="no line break any more") as raised:
        read(text[:-2], read(text, EMPTY))
    assert raised.value.line == text.count("\n")
    assert read(json.dumps(RUNNING), read(text, EMPTY)).entries[0].vmi.uid == RUNNING["metadata"]["uid"]


@pytest.mark.parametrize(
    "status",
    [
        {"phase": "Failed"},
        {"nodeName": "node-2", "migrationState": RUNNING["status"]["migrationState"] | {"migrationUid": "m-2"}},
    ],
)
def test_a_vmi_that_has_ended_or_migrates_anew_is_not_held_for_cut_off(status: dict[str, Any]) -> None:
    contents = read(yaml.safe_dump(RUNNING | {"status": status}), read(yaml.safe_dump(RUNNING), EMPTY))
    assert not contents.flaws
    (entry,) = contents.entries
    assert (entry.vmi.phase, entry.vmi.node_name) == (status.get("phase"), status.get("nodeName"))


def test_once_a_migration_is_over_its_state_may_be_removed() -> None:
    state = RUNNING["status"]["migrationState"] | {"completed": True, "endTimestamp": "2026-01-01T00:01:00Z"}
    over = read(yaml.safe_dump(RUNNING | {"status": RUNNING["status"] | {"migrationState": state}}), EMPTY)
    contents = read(yaml.safe_dump(RUNNING | {"status": {}}), over)
    assert not contents.flaws
    assert contents.entries[0].vmi.migration is None


def test_an_older_copy_without_the_migration_is_not_held_for_cut_off() -> None:
    old, new = (RUNNING | {"metadata": RUNNING["metadata"] | {"resourceVersion": version}} for version in ("9", "11"))
    text = yaml.safe_dump_all([old | {"status": {}}, new])
    before = read(text, EMPTY)
    assert read(text + "# edited\n", before) == before


def test_copies_of_a_broken_vmi_do_not_grow_in_number() -> None:
    good, bad = yaml.safe_dump(vmi()), yaml.safe_dump(vmi(nodeName=["a"]))
    contents = read(f"{good}---\n{good}", EMPTY)
    for _ in range(3):
        contents = read(f"{bad}---\n{bad}", contents)
    assert [entry.line for entry in contents.entries] == [1, 11]


def test_one_bad_vmi_is_reported_by_line_and_keeps_its_last_good_state() -> None:
    def text(phase: Any) -> str:
        return yaml.safe_dump_all([vmi("a", "1", phase="Running"), vmi("b", "2", phase=phase)])

    good = read(text("Running"), EMPTY)
    bad = read(text(["no", "string"]), good)
    assert [entry.vmi for entry in bad.entries] == [entry.vmi for entry in good.entries]
    (flaw,) = bad.flaws
    assert flaw.line == good.entries[1].line
    assert "default/b" in flaw.reason
    assert "status.phase" in flaw.reason
    assert [entry.vmi.name for entry in read(text(["no", "string"]), EMPTY).entries] == ["a"]


def test_a_vmi_without_a_uid_is_an_error_and_keeps_its_last_good_state() -> None:
    good = read(json.dumps(vmi("a")), EMPTY)
    bad = read(json.dumps(vmi("a", uid=None)), good)
    assert bad.entries == good.entries
    (flaw,) = bad.flaws
    assert "metadata.uid is missing" in flaw.reason


@pytest.mark.parametrize("value", ["{? [a] : b}", f"{{x: {'1' * 5000}}}"])
def test_a_value_that_cannot_be_made_is_a_flaw_of_its_vmi_alone(value: str) -> None:
    text = f"{HEAD}status: {value}\n---\n{yaml.safe_dump(vmi('b', '2'))}"
    contents = read(text, EMPTY)
    assert [entry.vmi.name for entry in contents.entries] == ["b"]
    assert [flaw.line for flaw in contents.flaws] == [1]


def test_words_and_times_stay_strings() -> None:
    text = yaml_vmi("sourceNode: on\nmigrationUid: 2026-08-01\nstartTimestamp: 2026-08-01T12:00:00Z\n")
    (entry,) = read(text, EMPTY).entries
    assert entry.vmi.migration
    assert (entry.vmi.migration.source_node, entry.vmi.migration.migration_uid) == ("on", "2026-08-01")
    assert str(entry.vmi.migration.start) == "2026-08-01 12:00:00+00:00"


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: 1\nb: [1\n", 2), ("a: 1\n  b: 2\n", 2), ('{\n"a": 1,\n"b"\n', 3), ("a: *b\n", 1), ("a: \x01\n", None)],
)
def test_text_that_does_not_parse_names_the_line(text: str, line: int | None) -> None:
    with pytest.raises(SyntaxFlaw) as caught:
        read(text, EMPTY)
    assert caught.value.line == line
    assert caught.value.reason


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_bottomless_nesting_is_refused_instead_of_ending_the_process(opening: str) -> None:
    with pytest.raises(SyntaxFlaw, match="nested more than"):
        read("a: 1\n---\n" + opening * 100_000, EMPTY)


def bomb(merge: str) -> str:
    """Nine to the eighth of keys in a few hundred bytes."""
    lines = ["  a0: &a0 {k0: 1}"]
    lines += [f"  a{n}: &a{n} {{{merge}: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9)]
    return f"{HEAD}status:\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "reason", "line"),
    [
        ("kind: List\nitems: &x [*x]\n", "the alias 'x'", 2),
        (f"{HEAD}status: &s {{migrationState: *s}}\n", "the alias 's'", 4),
        (bomb("<<"), "the alias 'a0'", 6),
        (bomb("k"), "the alias 'a0'", 6),
        (f"{HEAD}status: !!int '1:1'\n", "the tag 'tag:yaml.org,2002:int'", 4),
        (f"{HEAD}status: !x {{}}\n", "the tag '!x'", 4),
        (f"{HEAD}status: [{'a,' * document.MAX_NODES}]", "more than 1000000 keys", 4),
    ],
)
def test_what_could_take_all_memory_is_refused_with_its_line(text: str, reason: str, line: int) -> None:
    with pytest.raises(SyntaxFlaw) as caught:
        read(text, EMPTY)
    assert reason in caught.value.reason
    assert caught.value.line == line


@pytest.mark.parametrize(
    "text",
    [
        f"{HEAD}status: *{'a' * 100_000}",
        f"{HEAD}status: !{'a' * 100_000} x",
        f'{{"{"k" * 100_000}',
        'kind: VirtualMachineInstance\nmetadata: {name: "\\e]0;x\\u202e", namespace: "\\x9b"}\nstatus: {? [a] : b}\n',
        f"kind: VirtualMachineInstance\nmetadata: {{name: {'n' * 100_000}}}\nstatus: {{? [a] : b}}\n",
        f'kind: "\\e{"k" * 100_000}"\n',
    ],
)
def test_what_a_complaint_repeats_is_short_and_printable(text: str) -> None:
    try:
        contents = read(text, EMPTY)
        told = [flaw.reason for flaw in contents.flaws] + [kind for _, kind in contents.ignored]
    except SyntaxFlaw as flaw:
        told = [flaw.reason]
    assert told
    assert all(len(reason) < 1000 and reason.isprintable() for reason in told)


def test_json_with_tabs_and_surrogate_escapes_parses() -> None:
    assert names(json.dumps(vmi("a", phase="\N{GRINNING FACE}"), indent="\t")) == [("a", 1)]


def test_python_s_own_parser_serves_where_libyaml_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(yaml, "CSafeLoader")
    loader = document._make_loader()
    assert issubclass(loader, yaml.SafeLoader)
    monkeypatch.setattr(document, "_Loader", loader)
    text = yaml_vmi("migrationUid: m-1 # é😀\n")
    assert difference(text, published(text)) == [*BLOCK_PORTS, BLOCK_ADDRESS]
    indented = json.dumps(vmi(migrationState={"migrationUid": "m-1"}), indent="\t")
    assert published(indented) == json.dumps(json.loads(published(indented)), indent="\t")


# Several states of one VMI


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (Revision("10", "1"), Revision("9", "2")),
        (Revision("1" + "0" * 5000), Revision("9" * 5000)),
        (Revision("10", "3"), Revision("0010", "2")),
        (Revision("", "10"), Revision("7", "9")),
    ],
)
def test_a_state_is_newer_by_its_resource_version_and_then_its_generation(new: Revision, old: Revision) -> None:
    why = new.newer_than(old)
    assert why
    assert len(why) < 200
    assert old.newer_than(new) is None
    assert newest([old, new, old]) == 1
    assert newest([new, old, new]) == 0


@pytest.mark.parametrize("revision", [Revision(), Revision("7"), Revision("7", "1")])
def test_of_states_that_cannot_be_told_apart_the_first_counts(revision: Revision) -> None:
    assert newest([revision, Revision(), revision]) == 0


@pytest.mark.parametrize("version", ["1_0", "+10", "0x10", "\u0661", "v10", "10.5", ""])
def test_a_version_that_is_no_decimal_number_says_nothing(version: str) -> None:
    document = vmi()
    document["metadata"] |= {"resourceVersion": version, "generation": 3}
    (entry,) = read(json.dumps(document), EMPTY).entries
    assert entry.revision == Revision("", "3")


def test_publishing_edits_the_newest_of_several_states_in_the_file() -> None:
    states = [vmi(migrationState={"migrationUid": "m-1"}) for _ in range(3)]
    for state, version in zip(states, ("9", "10", "10"), strict=True):
        state["metadata"]["resourceVersion"] = version
    edited = publish(yaml.safe_dump_all(states), "u-1", "m-1", "10.1.1.1", PORTS)
    assert edited
    told = [one["status"]["migrationState"].get("targetNodeAddress") for one in yaml.safe_load_all(edited)]
    assert told == [None, "10.1.1.1", None]


# Publishing


BLOCK_PORTS = [
    "+     targetDirectMigrationNodePorts:\n",
    '+       "32899": 0\n',
    '+       "39497": 49153\n',
    '+       "42691": 49152\n',
]
BLOCK_ADDRESS = "+     targetNodeAddress: 10.1.1.1\n"
FLOW_PORTS = '{"32899": 0, "39497": 49153, "42691": 49152}'


@pytest.mark.parametrize(
    ("state", "added"),
    [
        pytest.param("migrationUid: m-1\nsourceNode: a\n", [*BLOCK_PORTS, BLOCK_ADDRESS], id="at the end"),
        pytest.param(
            "migrationUid: m-1\n# why\ntargetNode: b   # where\ntargetPod: p\n",
            [*BLOCK_PORTS, BLOCK_ADDRESS],
            id="among sorted keys",
        ),
        pytest.param("migrationUid: m-1\ntargetNodeAddress: 10.1.1.1\n", BLOCK_PORTS, id="address there"),
        pytest.param("migrationUid: m-1\nmode: |\n  text\n\n# end\n", [*BLOCK_PORTS, BLOCK_ADDRESS], id="block text"),
        pytest.param('migrationUid: &m "m-1"\n', [*BLOCK_PORTS, BLOCK_ADDRESS], id="anchor"),
        pytest.param("migrationUid: m-1\nmode:\n", [*BLOCK_PORTS, BLOCK_ADDRESS], id="empty value"),
        pytest.param(
            "migrationUid: m-1\nsourceState:\n  podIP:\n  - a\n  - b # é😀\n",
            [*BLOCK_PORTS, BLOCK_ADDRESS],
            id="nested end",
        ),
    ],
)
@pytest.mark.parametrize("around", ["", "# é😀\n---\nkind: Pod\n---\n"])
def test_new_keys_in_block_style_are_all_that_is_added(state: str, added: list[str], around: str) -> None:
    text = yaml_vmi(state, before=around, after="  phase: 'Running' # as it was\n\n# last\n...\n")
    assert sorted(difference(text, published(text))) == sorted(added)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("targetNodeAddress:", "targetNodeAddress: 10.1.1.1"),
        ("targetNodeAddress: # soon", "targetNodeAddress: 10.1.1.1 # soon"),
        ("targetNodeAddress: null # soon", "targetNodeAddress: 10.1.1.1 # soon"),
        ("targetNodeAddress: 10.9.9.9", "targetNodeAddress: 10.1.1.1"),
        ("targetNodeAddress:    '10.9.9.9'  # é", "targetNodeAddress:    '10.1.1.1'  # é"),
        ('targetNodeAddress: ""', 'targetNodeAddress: "10.1.1.1"'),
        ('"targetNodeAddress": x', '"targetNodeAddress": 10.1.1.1'),
    ],
)
def test_an_address_is_replaced_in_its_place(old: str, new: str) -> None:
    ports = f"targetDirectMigrationNodePorts: {FLOW_PORTS}\n"
    text = yaml_vmi(f"{old}\nmigrationUid: m-1\n{ports}")
    assert difference(text, published(text)) == [f"-     {old}\n", f"+     {new}\n"]


@pytest.mark.parametrize("address", ["fd00::1", "fd00::", "::1", "1:2:3:4:5:6:7:8"])
@pytest.mark.parametrize("state", ["migrationUid: m-1", "migrationUid: m-1\ntargetNodeAddress: 10.9.9.9"])
def test_an_ipv6_address_stays_a_string_in_any_yaml(address: str, state: str) -> None:
    edited = published(yaml_vmi(state + "\n"), address)
    assert yaml.safe_load(edited)["status"]["migrationState"]["targetNodeAddress"] == address


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "\n  '1': 0   # libvirt\n  # memory\n  2: 49152\n  \"3\": 49153",
            '\n  \'32899\': 0   # libvirt\n  # memory\n  "42691": 49152\n  "39497": 49153',
        ),
        (
            "\n     '1': 0\n     '2': 49152",
            '\n     "32899": 0\n     "39497": 49153\n     "42691": 49152',
        ),
        (" null  # none", '\n  "32899": 0\n  "39497": 49153\n  "42691": 49152  # none'),
        ("", '\n  "32899": 0\n  "39497": 49153\n  "42691": 49152'),
        (" {}  # none", f" {FLOW_PORTS}  # none"),
        (" {'1': 0, '2': 49153, '3': 49152}", " {'32899': 0, '39497': 49153, '42691': 49152}"),
        (' {"32899": "0", "39497": 49153, "42691": 49152}', f" {FLOW_PORTS}"),
    ],
)
def test_ports_are_replaced_in_their_place(old: str, new: str) -> None:
    def text(ports: str) -> str:
        state = f"migrationUid: m-1\ntargetDirectMigrationNodePorts:{ports}\ntargetNodeAddress: 10.1.1.1\n"
        return yaml_vmi(state, after="  phase: Running\n")

    assert published(text(old)) == text(new)


def test_the_target_state_gets_the_same_where_it_exists() -> None:
    text = yaml_vmi("migrationUid: m-1\ntargetState:\n    nodeAddress: old\n    pod: p\nsourceState: {}\n")
    edited = published(text)
    state = yaml.safe_load(edited)["status"]["migrationState"]
    assert state["targetState"] == {"nodeAddress": "10.1.1.1", "directMigrationNodePorts": PORTS, "pod": "p"}
    assert [line for line in difference(text, edited) if line[0] == "-"] == ["-         nodeAddress: old\n"]


def test_a_target_state_that_is_no_mapping_is_left_alone() -> None:
    text = yaml_vmi("migrationUid: m-1\ntargetState:\n")
    assert sorted(difference(text, published(text))) == sorted([*BLOCK_PORTS, BLOCK_ADDRESS])


def test_flow_style_stays_flow_style() -> None:
    text = f"{HEAD}status: {{migrationState: {{migrationUid: m-1, # é\n   sourceNode: a}}}}\n"
    new = f'targetDirectMigrationNodePorts: {FLOW_PORTS}, targetNodeAddress: "10.1.1.1"'
    assert published(text) == text.replace("a}}", f"a, {new}}}}}").replace("m-1, #", "m-1, #")


@pytest.mark.parametrize("layout", [{"indent": 4}, {"indent": "\t"}, {}, {"separators": (",", ":")}])
@pytest.mark.parametrize("last", [{}, {"zone": "z"}, {"targetState": {"pod": "p"}}, {"targetNodeAddress": None}])
def test_json_is_what_a_json_printer_would_have_made_of_it(layout: dict[str, Any], last: dict[str, Any]) -> None:
    state = {"migrationUid": "m-1"} | last
    text = json.dumps(vmi(migrationState=state, phase="\N{GRINNING FACE} \\ud83d é"), **layout)
    edited = published(text)
    document = json.loads(edited)
    assert json.dumps(document, **layout) == edited
    values = {"targetNodeAddress": "10.1.1.1", "targetDirectMigrationNodePorts": PORTS}
    if target_state := state.get("targetState"):
        new = {"nodeAddress": "10.1.1.1", "directMigrationNodePorts": PORTS}
        values["targetState"] = target_state | new
    assert document["status"]["migrationState"] == state | values


def test_windows_line_ends_and_a_byte_order_mark_stay() -> None:
    text = "\ufeff" + yaml_vmi("migrationUid: m-1\nsourceNode: a\n").replace("\n", "\r\n")
    edited = published(text)
    assert edited.startswith("\ufeffapi")
    assert "\n" not in edited.replace("\r\n", "")
    assert [line[2:] for line in difference(text, edited)] == [
        line[2:].replace("\n", "\r\n") for line in [*BLOCK_PORTS, BLOCK_ADDRESS]
    ]


def test_a_byte_order_mark_does_not_shift_what_is_replaced() -> None:
    text = "\ufeff" + yaml_vmi(f"migrationUid: m-1\ntargetNodeAddress: x\ntargetDirectMigrationNodePorts: {FLOW_PORTS}")
    assert published(text) == text.replace("Address: x", "Address: 10.1.1.1")


def test_a_file_without_a_last_line_end_gets_none() -> None:
    assert published(yaml_vmi("migrationUid: m-1")).endswith("\n    targetNodeAddress: 10.1.1.1")


def test_only_the_vmi_meant_is_edited_in_a_list() -> None:
    items = [vmi(f"vm{n}", f"u-{n}", migrationState={"migrationUid": f"m-{n}"}) for n in range(3)]
    text = yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": items})
    documents = yaml.safe_load(published(text))
    changed = [item["metadata"]["uid"] for item, old in zip(documents["items"], items, strict=True) if item != old]
    assert changed == ["u-1"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (HEAD.replace("u-1", "u-2"), "no VMI with the UID u-1"),
        (HEAD, "no status.migrationState"),
        (yaml_vmi("migrationUid: m-2\n"), "the VMI's migration is m-2 now"),
        (yaml_vmi("sourceNode: a\n"), "without a UID now"),
    ],
)
def test_a_vmi_that_has_changed_meanwhile_is_not_published_to(text: str, reason: str) -> None:
    with pytest.raises(EditError, match=reason):
        publish(text, "u-1", "m-1", "10.1.1.1", PORTS)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(yaml_vmi("migrationUid: m-1\ntargetNodeAddress: |\n  x\nmode: a\n"), id="block text"),
        pytest.param(
            yaml_vmi("migrationUid: m-1\ntargetDirectMigrationNodePorts:\n  '1': 0 # mine\n  '2': 49152\n"),
            id="comment that would be lost",
        ),
        pytest.param(yaml_vmi("? migrationUid\n: m-1\n? targetDirectMigrationNodePorts\n: null\n"), id="explicit key"),
    ],
)
def test_what_cannot_be_edited_safely_is_refused(text: str) -> None:
    with pytest.raises(EditError):
        publish(text, "u-1", "m-1", "10.1.1.1", PORTS)


keys = st.text("abnyt_-.", min_size=1, max_size=6) | st.sampled_from(["targetNode", "zz", "é", "on", "1"])
scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=12)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))


@settings(deadline=None)
@given(
    status=st.dictionaries(keys, values, max_size=4),
    state=st.dictionaries(keys, values, max_size=4),
    flow=st.sampled_from([True, False, None]),
    indent=st.integers(2, 6),
    target=st.none() | st.dictionaries(keys, values, max_size=2),
)
def test_any_other_content_comes_through_unchanged(
    status: dict[str, Any],
    state: dict[str, Any],
    flow: bool | None,
    indent: int,
    target: dict[str, Any] | None,
) -> None:
    full = state | {"migrationUid": "m-1"} | ({"targetState": target} if target is not None else {})
    documents = [vmi(**{**status, "migrationState": full}), {"kind": "Pod", "spec": status}]
    text = yaml.safe_dump_all(documents, default_flow_style=flow, indent=indent, allow_unicode=True, width=40)
    edited = publish(text, "u-1", "m-1", "10.1.1.1", PORTS)
    assert edited
    expected = list(yaml.safe_load_all(text))
    migration = expected[0]["status"]["migrationState"]
    migration |= {"targetNodeAddress": "10.1.1.1", "targetDirectMigrationNodePorts": PORTS}
    if target is not None:
        migration["targetState"] |= {"nodeAddress": "10.1.1.1", "directMigrationNodePorts": PORTS}
    assert list(yaml.safe_load_all(edited)) == expected
    kept = iter(edited)
    assert all(character in kept for character in text)
