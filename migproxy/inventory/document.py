"""VMIs in the text of a file: finding them, and putting a target's address and ports in. Pure.

A text is YAML or JSON (which is YAML's flow style), of one or more documents: VMIs, lists of them as
kubectl prints them, and objects of other kinds, which are passed over.

Whoever may edit a VMI may be hostile, so the size and depth of a text are bounded. Aliases (*name), merge keys and
tags (!!int) are not read: kubectl prints none, and a few hundred bytes of them can take all memory.

Scalars resolve as in YAML 1.2: a time, yes, no or 10:20 stay strings. Publishing is an edit of the text at
the positions that the parser reports, so that comments, quoting, order and indentation stay as they are.
"""

import gc
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent, ScalarEvent
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode, SequenceNode

from migproxy.inventory.contents import Contents, EditError, Entry, Flaw, NothingInIt, Revision, SyntaxFlaw, newest
from migproxy.text import excerpt, printable
from migproxy.vmi import VMI, InvalidVMI, parse

VMI_KIND: Final = "VirtualMachineInstance"
LIST_KINDS: Final = {"List": None, f"{VMI_KIND}List": VMI_KIND}
"""Kinds of lists, and the kind of an item that does not say its own (the API leaves it out)."""

MAX_DEPTH: Final = 100
MAX_REASON: Final = 300
"""Characters of a parser's complaint, or of a name, that an error repeats."""
MAX_NODES: Final = 1_000_000
"""Keys, values and list entries of a text; a VMI has some 600. A million takes 300 MiB, for a moment."""

Published = Mapping[str, str | Mapping[str, int]]


def read(text: str, last: Contents) -> Contents:
    """Find the VMIs in a file's text.

    Args:
        text: the whole file.
        last: what the file held before; the source of a flawed VMI's last good state.

    Raises:
        NothingInIt: there is no document; `last` stays in force.
        SyntaxFlaw: the text does not parse, or its last line has lost its line break; likewise.
    """
    former = _Former(last.entries)
    entries: list[Entry] = []
    flaws: list[Flaw] = []
    cuts: list[Flaw] = []
    ignored: list[tuple[int, str]] = []
    is_line_ended = text.endswith("\n")
    with _collector_paused():
        documents = _compose(_masked(_split_mark(text)[1]))
        if all(map(_is_null, documents)):
            raise NothingInIt
        if last.is_line_ended and not is_line_ended and not _is_json(_split_mark(text)[1]):
            raise SyntaxFlaw(
                "the last line has no line break any more, so the file is cut off: write it whole", text.count("\n") + 1
            )
        for node, kind in _objects(documents):
            line = _line(node)
            if kind == VMI_KIND:
                before = former.of(node)
                try:
                    entry = Entry(_vmi(node), line, _revision(node))
                    _check_whole(entry, before)
                    entries.append(entry)
                except InvalidVMI as error:
                    (flaws if _uid(node) else cuts).append(Flaw(str(error), line))
                    entries += [replace(one, line=line) for one in before]
            elif kind is None:  # kubectl prints a List's kind after its items
                cuts.append(Flaw("this is no Kubernetes object: it has no kind", line))
            elif _is_beginning(kind) and not _text(_value(node, "metadata", "name")):
                reason = f"this is no Kubernetes object: its kind is {excerpt(kind)}, and it has no name"
                cuts.append(Flaw(reason, line))
            else:
                ignored.append((line, printable(kind[:100])))
    if cuts:  # what is missing may be any of those before
        found = {entry.vmi.uid for entry in entries}
        if others := [one for uid, one in former.by_uid.items() if uid not in found]:
            entries += others
            cuts = [replace(cut, reason=f"{cut.reason}; VMIs that the file held before stay in force") for cut in cuts]
    return Contents(tuple(entries), (*flaws, *cuts), tuple(ignored), is_line_ended)


def publish(text: str, uid: str, migration_uid: str | None, address: str, ports: Mapping[str, int]) -> str | None:
    """Put a target's address and ports into the status of a VMI, and change nothing else.

    They become status.migrationState.targetNodeAddress and .targetDirectMigrationNodePorts, and nodeAddress
    and directMigrationNodePorts of status.migrationState.targetState where that is a mapping (KubeVirt).

    Args:
        text: the whole file.
        uid: metadata.uid of the VMI.
        migration_uid: the status.migrationState.migrationUid that it must have.
        address: the target's address.
        ports: TCP port, as a string, to the channel's number.

    Returns:
        The new text; None where the VMI has exactly these values already.

    Raises:
        SyntaxFlaw: the text does not parse.
        EditError: the text does not hold that VMI and migration (any more), or no edit of it could be made
            whose only effect are these values.
    """
    mark, body = _split_mark(text)
    with _collector_paused():
        documents = _compose(_masked(body))
        targets = _targets(documents, uid, migration_uid, address, ports)
        step = _indentation_step(documents, uid)
        edits = [edit for mapping, values in targets for edit in _edits(body, mapping, values, step)]
        if not edits:
            return None
        edited = _applied(body, edits)
        try:
            again = _compose(_masked(edited))
            targets_again = _targets(again, uid, migration_uid, address, ports)
        except (SyntaxFlaw, EditError) as error:
            raise EditError(f"an edit would break the file ({error})") from None
        if not _is_only_difference(documents, targets, again, targets_again):
            raise EditError("an edit would change more than the address and ports")
    return mark + edited


# Parsing


_BYTE_ORDER_MARK: Final = "\N{ZERO WIDTH NO-BREAK SPACE}"
_SURROGATE_ESCAPE: Final = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")

_SCALARS: Final = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
)


def _make_loader() -> Any:
    """libyaml's parser (15 times faster), if its marks count characters as Python's do, else PyYAML's own."""
    loader: Any = yaml.SafeLoader
    sample = "a: \N{LATIN SMALL LETTER E WITH ACUTE}\N{GRINNING FACE} # \N{GREEK SMALL LETTER ALPHA}\r\nb: c"
    fast = getattr(yaml, "CSafeLoader", None)
    if fast:
        node = yaml.compose(sample, fast)
        if isinstance(node, MappingNode) and node.value[-1][1].start_mark.index == len(sample) - 1:
            loader = fast
    loader = type("Loader", (loader,), {"yaml_implicit_resolvers": {}})
    for tag, pattern, first in _SCALARS:
        loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})\\Z"), first)
    return loader


_Loader: Final = _make_loader()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the garbage collector from walking a growing tree again and again.

    5 MB of YAML: 0.3 s instead of 1.8 s. Where two threads do this at once, one of them may lose the gain.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _split_mark(text: str) -> tuple[str, str]:
    """Take the byte order mark off, which libyaml does not count among the characters."""
    body = text.removeprefix(_BYTE_ORDER_MARK)
    return text[: len(text) - len(body)], body


def _masked(body: str) -> str:
    """The text as the parser can take it, every position the same.

    JSON allows two things that YAML does not: tabs between tokens, and surrogate pairs as two escapes.
    """
    if not _is_json(body):
        return body
    return _SURROGATE_ESCAPE.sub(r"\\ufffd", body.replace("\t", " "))


def _is_json(body: str) -> bool:
    return body.lstrip()[:1] in ("{", "[")


def _compose(body: str) -> list[Node]:
    try:
        _check_size(body)
        loader = _Loader(body)
        try:
            documents = []
            while loader.check_node():
                documents.append(loader.get_node())
            return documents
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        reason = printable(": ".join(part for part in (error.context, error.problem) if part)[:MAX_REASON])
        mark = error.problem_mark or error.context_mark
        last = body.rstrip().count("\n")  # libyaml's marks at the end of the text are a line further
        raise SyntaxFlaw(reason, min(mark.line, last) + 1 if mark else None) from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise SyntaxFlaw(printable(" ".join(str(error).split())[:MAX_REASON]), None) from None


def _check_size(body: str) -> None:
    """Refuse what would take too much of anything to compose.

    Depth overflows the stack of PyYAML's composer, which ends the process (100,000 brackets do).
    """
    depth = nodes = 0
    for event in yaml.parse(body, _Loader):
        if isinstance(event, CollectionEndEvent):
            depth -= 1
        if not isinstance(event, NodeEvent):
            continue
        nodes += 1
        depth += isinstance(event, CollectionStartEvent)
        wrong = None
        if isinstance(event, AliasEvent):
            wrong = f"the alias {excerpt(event.anchor)}: aliases are not read, write the value out"
        elif isinstance(event, (ScalarEvent, CollectionStartEvent)) and event.tag not in (None, "!"):
            wrong = f"the tag {excerpt(event.tag)}: tags are not read, leave it out"
        elif depth > MAX_DEPTH:
            wrong = f"it is nested more than {MAX_DEPTH} levels deep"
        elif nodes > MAX_NODES:
            wrong = f"it has more than {MAX_NODES} keys, values and list entries: split it"
        if wrong:
            raise SyntaxFlaw(wrong, event.start_mark.line + 1 if event.start_mark else None)


def _objects(documents: list[Node]) -> Iterator[tuple[Node, str | None]]:
    """The objects and their kinds, lists opened up; kind None: not an object."""
    for document in documents:
        kind = _text(_value(document, "kind"))
        if kind in LIST_KINDS:
            items = _value(document, "items")
            for item in items.value if isinstance(items, SequenceNode) else ():
                default = LIST_KINDS[kind] if isinstance(item, MappingNode) else None
                yield item, _text(_value(item, "kind")) or default
        elif not _is_null(document):
            yield document, kind


def _vmi(node: Node) -> VMI:
    """Read a VMI, but for its spec: most of the text, and nothing there is needed."""
    assert isinstance(node, MappingNode)
    needed = [pair for pair in node.value if _text(pair[0]) != "spec"]
    document = _construct(MappingNode(node.tag, needed, node.start_mark, node.end_mark))
    if not isinstance(document, Mapping):
        raise InvalidVMI("a VMI must be a mapping")
    return parse(document)


def _revision(node: Node) -> Revision:
    texts = [_text(_value(node, "metadata", name)) or "" for name in ("resourceVersion", "generation")]
    return Revision(*(text if text.isascii() and text.isdecimal() else "" for text in texts))


def _construct(node: Node) -> Any:
    try:
        return yaml.constructor.SafeConstructor().construct_document(node)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InvalidVMI(f"VMI {_shown(node)}: {error.problem}{where}") from None
    except ValueError:  # Python's limit
        raise InvalidVMI(f"VMI {_shown(node)}: an integer has more than 4300 digits") from None


def _pair(mapping: Node | None, name: str) -> tuple[Node, Node] | None:
    """A key and its value; the last of several, as parsers have it."""
    if not isinstance(mapping, MappingNode):
        return None
    return next((pair for pair in reversed(mapping.value) if _text(pair[0]) == name), None)


def _value(mapping: Node | None, *path: str) -> Node | None:
    for name in path:
        pair = _pair(mapping, name)
        mapping = pair[1] if pair else None
    return mapping


def _text(node: Node | None) -> str | None:
    return node.value if isinstance(node, ScalarNode) and not _is_null(node) else None


def _is_null(node: Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _name(node: Node) -> str:
    metadata = _value(node, "metadata")
    return f"{_text(_value(metadata, 'namespace')) or 'default'}/{_text(_value(metadata, 'name'))}"


def _shown(node: Node) -> str:
    """The name for errors, whatever it is."""
    return printable(_name(node)[:MAX_REASON])


def _uid(node: Node) -> str:
    return _text(_value(node, "metadata", "uid")) or ""


def _is_beginning(kind: str) -> bool:
    """Whether a kind may be what a cut has left of one that counts."""
    return any(known.startswith(kind) for known in (VMI_KIND, *LIST_KINDS))


# What was read before


class _Former:
    """The entries of a file as it was before: of each UID the one that counts."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        copies: dict[str, list[Entry]] = {}
        for entry in entries:
            copies.setdefault(entry.vmi.uid, []).append(entry)
        self.by_uid = {uid: several[newest(one.revision for one in several)] for uid, several in copies.items()}
        self._by_name: dict[str, list[Entry]] = {}
        for entry in self.by_uid.values():
            self._by_name.setdefault(f"{entry.vmi.namespace}/{entry.vmi.name}", []).append(entry)

    def of(self, node: Node) -> list[Entry]:
        """Those of a VMI: by UID; by name where the document has lost its UID, or a part of it."""
        uid = _uid(node)
        if uid in self.by_uid:
            return [self.by_uid[uid]]
        return [one for one in self._by_name.get(_name(node), ()) if one.vmi.uid.startswith(uid)]


def _check_whole(entry: Entry, former: Iterable[Entry]) -> None:
    """Refuse what is left of a VMI that was cut off.

    KubeVirt takes neither status.migrationState nor status.nodeName away before the migration is over.

    Raises:
        InvalidVMI: it has lost something that it had before; an older state, as in a copy, may never have had it.
    """
    vmi = entry.vmi
    for one in former:
        before = one.vmi
        if before.migration is None or before.is_done() or before.has_ended() or vmi.has_ended():
            continue
        if one.revision.newer_than(entry.revision):
            continue
        lost = None
        if vmi.uid != before.uid:
            lost = "a part of metadata.uid"
        elif vmi.migration is None:
            lost = "status.migrationState"
        elif before.node_name and not vmi.node_name:
            lost = "status.nodeName"
        if lost:
            migration = f"migration {before.migration.migration_uid or 'without a UID'}"
            raise InvalidVMI(
                f"VMI {vmi.namespace}/{vmi.name} has lost {lost}, and {migration} is not over: what was read before"
                " stays in force; write the whole VMI, or remove it to end the migration"
            )


# Publishing


@dataclass(frozen=True, slots=True)
class _Edit:
    """Replace text[start:end]."""

    start: int
    end: int
    text: str


def _targets(
    documents: list[Node], uid: str, migration_uid: str | None, address: str, ports: Mapping[str, int]
) -> list[tuple[MappingNode, Published]]:
    """The mappings to change, and what each is to hold."""
    state = _value(_find(documents, uid), "status", "migrationState")
    if not isinstance(state, MappingNode):
        raise EditError("the VMI has no status.migrationState (any more)")
    present = _text(_value(state, "migrationUid"))
    if (present or None) != migration_uid:
        raise EditError(f"the VMI's migration is {printable(present[:MAX_REASON]) if present else 'without a UID'} now")
    targets: list[tuple[MappingNode, Published]] = [
        (state, {"targetDirectMigrationNodePorts": ports, "targetNodeAddress": address})
    ]
    target_state = _value(state, "targetState")
    if isinstance(target_state, MappingNode):
        targets.append((target_state, {"directMigrationNodePorts": ports, "nodeAddress": address}))
    return targets


def _find(documents: list[Node], uid: str) -> Node:
    """The VMI with the UID; of several, the one that counts."""
    found = [n for n, kind in _objects(documents) if kind == VMI_KIND and _text(_value(n, "metadata", "uid")) == uid]
    if not found:
        raise EditError(f"the file holds no VMI with the UID {uid} (any more)")
    return found[newest(map(_revision, found))]


def _indentation_step(documents: list[Node], uid: str) -> int:
    status = _value(_find(documents, uid), "status")
    state = _value(status, "migrationState")
    step = _column(state) - _column(status)
    return step if step > 0 else 2


def _column(mapping: Node | None) -> int:
    return mapping.value[0][0].start_mark.column if isinstance(mapping, MappingNode) and mapping.value else 0


def _edits(text: str, mapping: MappingNode, values: Published, step: int) -> Iterator[_Edit]:
    missing: dict[str, str | Mapping[str, int]] = {}
    for name, value in values.items():
        pair = _pair(mapping, name)
        if pair is None:
            missing[name] = value
        elif not _holds(pair[1], value):
            yield from _replacement(text, mapping, *pair, value, step)
    if mapping.flow_style and not mapping.value:
        style = _FlowStyle.of(text, mapping)
        if missing:
            yield _insertion(mapping.start_mark.index + 1, style.pairs(missing))
    elif mapping.flow_style:
        style = _FlowStyle.of(text, mapping)
        for name, value in missing.items():
            after = _end(_predecessor(mapping, name))
            yield _insertion(after, style.separator + style.pairs({name: value}))
    else:
        newline = "\r\n" if "\r\n" in text else "\n"
        for name, value in missing.items():
            after = _line_end(text, _end(_predecessor(mapping, name)))
            column = _column(mapping)
            yield _insertion(after, newline + " " * column + name + _block_value(value, column + step, newline))


def _holds(node: Node, value: str | Mapping[str, int]) -> bool:
    if isinstance(value, str):
        return _text(node) == value
    if not isinstance(node, MappingNode) or len(node.value) != len(value):
        return False
    return {_text(port): _integer(channel) for port, channel in node.value} == value


def _integer(node: Node) -> int | None:
    is_integer = isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:int" and node.value.isdecimal()
    return int(node.value) if is_integer else None


def _replacement(
    text: str,
    mapping: MappingNode,
    key: Node,
    old: Node,
    new: str | Mapping[str, int],
    step: int,
) -> Iterator[_Edit]:
    start, end = old.start_mark.index, _end(old)
    if isinstance(new, str):
        space = " " if start == end and text[start - 1] == ":" else ""
        yield _Edit(start, end, space + _quoted(new, old, mapping))
    elif renamed := _renamed_ports(old, new):
        yield from renamed
    elif "#" in text[start:end]:
        raise EditError(f"the value of {_text(key)} has comments that would be lost")
    elif mapping.flow_style or (isinstance(old, CollectionNode) and old.flow_style):
        yield _Edit(start, end, _FlowStyle.of(text, mapping).nested(new))
    else:
        newline = "\r\n" if "\r\n" in text else "\n"
        column = _column(old) or _column(mapping) + step
        yield _Edit(key.end_mark.index, end, _block_value(new, column, newline))


def _renamed_ports(old: Node, new: Mapping[str, int]) -> list[_Edit]:
    """Change only the ports, where the old map has the same channels: its comments and layout stay."""
    ports = {channel: port for port, channel in new.items()}
    if not isinstance(old, MappingNode):
        return []
    channels = [(key, channel) for key, value in old.value if (channel := _integer(value)) is not None]
    if len(channels) != len(old.value) or sorted(channel for _, channel in channels) != sorted(ports):
        return []
    edits = []
    for key, channel in channels:
        quote = "'" if key.style == "'" else '"'
        edits.append(_Edit(key.start_mark.index, key.end_mark.index, quote + ports[channel] + quote))
    return edits


def _quoted(value: str, old: Node, mapping: MappingNode) -> str:
    """An address as the old one was quoted; an IPv6 address always is (its colons mean something in YAML)."""
    plain = isinstance(old, ScalarNode) and not old.style and not mapping.flow_style and ":" not in value
    quote = "" if plain else "'" if isinstance(old, ScalarNode) and old.style == "'" else '"'
    return quote + value + quote


def _block_value(value: str | Mapping[str, int], column: int, newline: str) -> str:
    if isinstance(value, str):
        return f': "{value}"' if ":" in value else f": {value}"
    return ":" + "".join(f'{newline}{" " * column}"{port}": {channel}' for port, channel in sorted(value.items()))


@dataclass(frozen=True, slots=True)
class _FlowStyle:
    """How a mapping in flow style is laid out.

    Args:
        separator: between two pairs, such as ", " or a comma and an indented new line.
        colon: between a key and its value.
        closing: before the closing bracket.
        quote: around keys.
    """

    separator: str
    colon: str
    closing: str
    quote: str

    @classmethod
    def of(cls, text: str, mapping: MappingNode) -> "_FlowStyle":
        if not mapping.flow_style or not mapping.value:
            return cls(", ", ": ", "", '"' if _is_json(text) else "")
        (key, value), *others = mapping.value
        colon = text[key.end_mark.index : value.start_mark.index]
        colon = colon if colon.strip() == ":" else ": "
        lead = text[mapping.start_mark.index + 1 : key.start_mark.index]
        separator = "," + (lead if "\n" in lead and not lead.strip() else " " if colon != ":" else "")
        if others:
            between = text[_end(value) : others[0][0].start_mark.index]
            separator = between if between.strip() == "," else separator
        closing = text[_end(mapping.value[-1][1]) : mapping.end_mark.index - 1]
        return cls(separator, colon, "" if closing.strip() else closing, '"' if key.style == '"' else "")

    def pairs(self, values: Published) -> str:
        return self.separator.join(
            f"{self.quote}{name}{self.quote}{self.colon}"
            + (f'"{value}"' if isinstance(value, str) else self.nested(value))
            for name, value in values.items()
        )

    def nested(self, ports: Mapping[str, int]) -> str:
        """A port map as the value of a pair of this mapping."""
        outer = self.separator.partition(",")[2]
        inner = outer + (outer.removeprefix(self.closing) or "  ") if "\n" in outer else ""
        separator = "," + inner if inner else self.separator
        pairs = separator.join(f'"{port}"{self.colon}{channel}' for port, channel in sorted(ports.items()))
        return "{" + inner + pairs + (outer if inner else "") + "}"


def _predecessor(mapping: MappingNode, name: str) -> Node:
    """The value after which a new key goes: the alphabetical neighbour (kubectl sorts keys), else the last.

    A value whose end in the text is not known exactly (a block scalar) cannot serve.
    """
    usable: list[tuple[Node, Node]] = [
        (key, value) for key, value in mapping.value if not _is_block_scalar(_leaf(value))
    ]
    if not usable:
        raise EditError("there is no place in status.migrationState to put a new key")
    before = [pair for pair in usable if (_text(pair[0]) or "") < name]
    _, value = max(before, key=lambda pair: _text(pair[0]) or "") if before else usable[-1]
    return value


def _leaf(node: Node) -> Node:
    """What the text of a value ends with: itself, or for a collection in block style its last value's leaf."""
    while isinstance(node, CollectionNode) and not node.flow_style and node.value:
        node = node.value[-1][1] if isinstance(node, MappingNode) else node.value[-1]
    return node


def _is_block_scalar(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.style in ("|", ">")


def _end(node: Node) -> int:
    """Where the text of a value ends; the parser's own mark of a block collection is at the next token."""
    return int(_leaf(node).end_mark.index)


def _line_end(text: str, position: int) -> int:
    match = re.compile(r"[\r\n]|\Z").search(text, position)
    assert match
    return match.start()


def _insertion(position: int, text: str) -> _Edit:
    return _Edit(position, position, text)


def _applied(text: str, edits: list[_Edit]) -> str:
    parts = []
    done = 0
    for edit in sorted(edits, key=lambda edit: edit.start):
        parts += [text[done : edit.start], edit.text]
        done = edit.end
    return "".join([*parts, text[done:]])


def _is_only_difference(
    before: list[Node],
    targets_before: list[tuple[MappingNode, Published]],
    after: list[Node],
    targets_after: list[tuple[MappingNode, Published]],
) -> bool:
    """The new text holds what was to be published, and is the old one in all else."""
    if not all(_holds_all(mapping, values) for mapping, values in targets_after):
        return False
    for mapping, values in targets_before + targets_after:
        mapping.value = [pair for pair in mapping.value if _text(pair[0]) not in values]
    return _same(before, after)


def _holds_all(mapping: MappingNode, values: Published) -> bool:
    pairs = {name: _pair(mapping, name) for name in values}
    return all(pair and _holds(pair[1], values[name]) for name, pair in pairs.items())


def _same(left: list[Node], right: list[Node]) -> bool:
    """Equal trees."""
    pairs: list[tuple[Any, Any]] = [(left, right)]
    while pairs:
        one, other = pairs.pop()
        if isinstance(one, (list, tuple)):
            if len(one) != len(other):
                return False
            pairs += zip(one, other, strict=True)
        elif type(one) is not type(other) or one.tag != other.tag:
            return False
        elif isinstance(one, ScalarNode):
            if one.value != other.value:
                return False
        else:
            pairs.append((one.value, other.value))
    return True
