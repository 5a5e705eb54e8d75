"""What it costs that migrations survive the daemon's death: with a holder against without, in pairs.

    scripts/sandbox .venv/bin/python -m benchmarks.holder [--pairs 20] [--seconds 1]

Two pairs of daemons run side by side, one of which hands its descriptors to holders; they take turns, which of them
first is by chance. The figures are medians of the pairs' ratios, which a machine that others use too moves less than
either side's own figure.
"""

import argparse
import os
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from migproxy.bench.contestants import Contestant, Migproxy
from migproxy.bench.measure import RPC, probe, round_trip, setup, stream
from migproxy.bench.stage import VETH, Process, Stage, until

_PAGES = 128 << 10  # bytes of QEMU's multifd packets of pages
_MESSAGES = 4000
_AT_ONCE = 8


class Held(Migproxy):
    """Daemons that have a holder each."""

    def _run(self, command: Sequence[str], log: Path) -> Process:
        path = log.with_suffix(".holder")
        holder = Process([sys.executable, "-m", "migproxy", "holder", str(path)], log.with_suffix(".holder.log"))
        self._stack.callback(holder.close)
        until(lambda: holder.has_ended or path.is_socket(), f"{path}")
        if holder.has_ended:
            raise holder.failure("ended")
        return super()._run(["env", f"NOTIFY_SOCKET={path}", *command], log)


Figures = dict[str, float]
"""By unit."""


def compare(
    name: str, pairs: int, both: tuple[Contestant, Contestant], measure: Callable[[Contestant], Figures]
) -> None:
    """Measures both in turns, and prints the medians.

    Args:
        name: Of what is measured.
        pairs: How often.
        both: Without a holder, and with one.
        measure: Measures one.
    """
    got = [{contestant: measure(contestant) for contestant in random.sample(both, 2)} for _ in range(pairs)]
    for unit in got[0][both[0]]:
        without, held = ([each[contestant][unit] for each in got] for contestant in both)
        ratios = [one / other for one, other in zip(held, without, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name}: {statistics.median(without):.3f} {unit} without, {statistics.median(held):.3f} with")
        print(f"    with / without: {middle:.2%} (quartiles {low:.2%}, {high:.2%}; {pairs} pairs)", flush=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.holder", description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1)
    options = parser.parse_args()
    os.environ.pop("NOTIFY_SOCKET", None)
    with (
        Stage(sandboxed=True) as stage,
        Migproxy(stage, stage.networks[VETH], name="without") as without,
        Held(stage, stage.networks[VETH], name="with") as held,
    ):
        both = (without, held)
        for contestant in both:
            probe(stage, contestant)
        for connections in (1, 8):

            def flow(contestant: Contestant, connections: int = connections) -> Figures:
                moved = stream(stage, contestant, connections=connections, seconds=options.seconds, chunk=_PAGES)
                return {"GB/s": moved.rate / 1e9, "s of CPU per GiB": moved.used.cpu / moved.gib}

            compare(f"{connections} stream{'s' if connections > 1 else ''}", options.pairs, both, flow)
        compare(
            f"round trip of {RPC} bytes",
            options.pairs,
            both,
            lambda contestant: {"us": round_trip(stage, contestant, count=_MESSAGES)[0] * 1e6},
        )
        compare(
            f"connections set up, {_AT_ONCE} at once",
            max(2, options.pairs // 4),
            both,
            lambda contestant: {"per second": setup(stage, contestant, seconds=options.seconds, parallel=_AT_ONCE)[0]},
        )
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
