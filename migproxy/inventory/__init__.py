"""Where VMIs come from, and where a target's address and ports are published."""

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from migproxy.portmap import IPAddress, PortMap
from migproxy.vmi import VMI

__all__ = ["BYPASSED", "FAILED", "RELAYED", "Inventory", "InventoryError", "PublishError"]

FAILED = "MigrationProxyFailed"
BYPASSED = "MigrationProxyBypassed"
RELAYED = "MigrationProxyRelayed"
"""Reasons of what is noted on a VMI: its migration cannot be served, goes by virt-handler's proxy, or was relayed."""


class InventoryError(Exception):
    """The inventory cannot be used at all: what it is to read is missing or unreadable."""


class PublishError(Exception):
    """A target's address and ports could not be published; the message says why and what to do."""


class Inventory(Protocol):
    """VMIs as they are now and as they change, and the way back to their status."""

    def changes(self) -> AsyncIterator[Mapping[str, VMI | None]]:
        """Yield batches of changes: VMI UID to its new state, None where the VMI is gone.

        The first batch is the whole state, empty where there is no VMI: from then on the inventory is
        synchronised. Nothing is told twice. To be iterated once.

        Raises:
            InventoryError: there is nothing to read from.
        """
        ...

    async def publish(self, vmi: VMI, address: IPAddress, ports: PortMap) -> None:
        """Write the target's address and ports into the VMI's status; nothing where they stand already.

        Args:
            vmi: the target VMI, as `changes` told it.
            address: this node's migration address.
            ports: the TCP ports that the target listens on, by channel.

        Raises:
            PublishError: they could not be written, or the VMI has changed meanwhile.
        """
        ...

    def note(self, vmi: VMI, reason: str, message: str, *, warning: bool = False) -> None:
        """Tell whoever looks at the VMI, where there is a way to; never waits, never fails.

        Args:
            vmi: whom it is about.
            reason: in CamelCase, for machines.
            message: for people.
            warning: somebody must mend something.
        """
        ...

    @property
    def problems(self) -> Mapping[str, str]:
        """What keeps VMIs from being read or followed now: where it is (a path, a URL) to what it is."""
        ...

    @property
    def flaws(self) -> Mapping[str, str]:
        """What is wrong now with what was read: where it is (path:line, a VMI's UID) to what it is.

        It concerns those VMIs alone, whose last good state stays in force: it says nothing of the node.
        """
        ...

    def may_hide(self, uid: str) -> bool:
        """Whether a VMI that `changes` does not tell of may be there all the same, and only not be readable now.

        Args:
            uid: the VMI's.
        """
        ...
