"""Beside virt-handler, a daemon or a relay is killed at each step of a connection's life: the launcher sees it once.

As tests/net/test_every_step.py, whose steps these are, with virt-handlers: they serve what the two migproxies do not.
"""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.kube.beside_daemons import Nodes, nodes
from tests.kube.cluster import Cluster
from tests.net.test_every_step import Dying

pytestmark = pytest.mark.tier("gate")

FEWEST = 12  # steps that a connection's life has, whatever becomes of the code


async def deaths(made: Nodes, which: str, side: int, steps: Path, stride: int) -> list[tuple[str, list[str]]]:
    """Makes a connection for each step at which a process can die, and one at which it does not.

    Returns:
        What became of each (see `Nodes.live`), and the steps that were begun.
    """
    fates, dies, at = [], True, 1
    async with AsyncExitStack() as stack:
        dying = Dying(made.daemons[side], which, steps)
        for daemon in made.daemons:
            await daemon.start()
        while dies:
            await dying.start(at)
            await made.prepare(f"migration-{at}")
            dying.arm()
            life = asyncio.create_task(made.live())
            stack.callback(life.cancel)
            dies = await dying.meanwhile(life)
            begun = dying.steps
            await dying.start(1 << 30)  # the next one: who waits in a queue is served
            fates.append((await life, begun))
            at += stride
    assert at > FEWEST
    return fates


STRIDES = pytest.mark.parametrize(
    "stride", [pytest.param(11, id="eleventh"), pytest.param(1, id="each", marks=pytest.mark.tier("soak"))]
)
SIDES = pytest.mark.parametrize("side", [pytest.param(0, id="source"), pytest.param(1, id="target")])
HANDED_OVER, HEARD = "sendmsg", "open"
"""The steps with which a daemon hands over what it has accepted, and a target looks for its launcher."""


@STRIDES
@SIDES
@pytest.mark.parametrize("way", ["plaintext", "mTLS"])
async def test_daemons_death_at_any_step(kubernetes: Cluster, tmp_path: Path, way: str, side: int, stride: int) -> None:
    async with nodes(kubernetes, tmp_path, tls=way == "mTLS") as made:
        fates = await deaths(made, "daemon", side, tmp_path / "steps", stride)
    lost = [steps[:-1] for fate, steps in fates if fate != "served"]
    print(f"{len(fates)} deaths, lost: {lost}")
    if side == 0:
        assert not [steps for steps in lost if HANDED_OVER in steps]
    else:  # a source that has not said its last word goes by virt-handler
        assert not [steps for steps in lost if HANDED_OVER in steps and HEARD not in steps]


@STRIDES
@SIDES
async def test_relays_death_at_any_step(kubernetes: Cluster, tmp_path: Path, side: int, stride: int) -> None:
    async with nodes(kubernetes, tmp_path, tls=False) as made:
        fates = await deaths(made, "relay", side, tmp_path / "steps", stride)
    assert {fate for fate, _ in fates} == {"served"}
