"""What a start costs: CPU time and wall-clock time until the daemon is ready, and until --help has been printed.

    scripts/sandbox .venv/bin/python -m benchmarks.start [--starts 10]

Each daemon is killed as soon as it answers on its control socket that it is ready; its CPU time is what the kernel
then says of it. The figures are medians. CPU time grows less on a machine that others use too than wall-clock time.
Python's bytecode is there, as where migproxy is installed.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from migproxy import control
from migproxy.devcerts import make
from tests.kube.cluster import cluster

_POLL = 0.005  # seconds between two looks at a daemon that is starting
_PATIENCE = 60  # seconds until it is given up


def measure(name: str, starts: int, command: Sequence[str], is_done: Callable[[], bool] | None) -> None:
    """Starts a program again and again, and prints the medians.

    Args:
        name: Of what is started.
        starts: How often; once more, so that Python's caches are filled.
        command: Its arguments.
        is_done: Whether it has done what is measured; None where it ends by itself.
    """
    took = [_start(command, is_done) for _ in range(starts + 1)][1:]
    cpu, wall = (statistics.median(figures) * 1e3 for figures in zip(*took, strict=True))
    print(f"{name:40} {cpu:4.0f} ms of CPU  {wall:4.0f} ms", flush=True)


def _start(command: Sequence[str], is_done: Callable[[], bool] | None) -> tuple[float, float]:
    began = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    program = [sys.executable, "-m", "migproxy", *command]
    with subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr
        while is_done is not None and not is_done():
            if process.poll() is not None or time.perf_counter() - began > _PATIENCE:
                process.kill()
                sys.exit(f"{' '.join(command)}: {process.stderr.read().decode()}")
            time.sleep(_POLL)
        if is_done is not None:
            process.kill()
        _, process.returncode, used = os.wait4(process.pid, 0)
    return used.ru_utime + used.ru_stime, time.perf_counter() - began


def _is_ready(path: Path) -> bool:
    try:
        return path.is_socket() and bool(control.ask(str(path))["ready"])
    except control.ControlError:
        return False


async def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--starts", type=int, default=10)
    starts = parser.parse_args().starts
    with tempfile.TemporaryDirectory(prefix="start-") as name:
        folder = Path(name)
        make(str(folder / "certs"), 1)
        (folder / "vmis").mkdir()
        socket = folder / "control"
        run = ["run", "--node-name", "node01", "--migration-address", "127.0.0.1", "--control-socket", str(socket)]
        files, tls = ["--vmi-dir", str(folder / "vmis")], ["--tls-dir", str(folder / "certs")]
        no_http, http = ["--http-listen", "off"], ["--http-listen", "127.0.0.1:0"]

        def daemon(what: str, *options: str) -> None:
            measure(what, starts, [*run, *options], lambda: _is_ready(socket))

        measure("--help", starts, ["--help"], None)
        measure("run --help", starts, ["run", "--help"], None)
        daemon("files, plaintext, no HTTP", *files, *no_http, "--disable-tls")
        daemon("files, plaintext, HTTP", *files, *http, "--disable-tls")
        daemon("files, mTLS, HTTP", *files, *http, *tls)
        daemon("files, mTLS, HTTP, interface lo", *files, *http, *tls, "--migration-interface", "lo")
        async with cluster(folder, separate=True) as kubernetes:
            kubeconfig = ["--kubeconfig", str(kubernetes.kubeconfig(folder, "node01"))]
            await asyncio.to_thread(daemon, "cluster, mTLS, HTTP", *kubeconfig, *http, *tls)
    print(f"medians of {starts} starts; load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    asyncio.run(main())
