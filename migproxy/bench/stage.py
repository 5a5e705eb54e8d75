"""Where the benchmark happens: a folder, the compiled programs, two nodes and the network between them."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import IO, Self

VETH = "veth"
LOOPBACK = "loopback"
_SANDBOX = "MIGPROXY_SANDBOX"
_CONGESTION = "/proc/sys/net/ipv4/tcp_congestion_control"
_SETUP = 'mount --make-rprivate / && mount -t tmpfs tmpfs /run && ip link set lo up && exec "$@"'


class BenchError(Exception):
    """The benchmark, or a contestant in it, cannot go on; the message says why and shows its words."""


def enter_sandbox() -> str | None:
    """Starts this program anew in network, mount and PID namespaces of its own, unless it is in such already.

    When it ends, in whatever way, the kernel ends every process in them and takes every interface and file away.

    Returns:
        Why there are no namespaces, None where there are; on the first call of those it does not return.
    """
    if os.environ.get(_SANDBOX):
        return None
    if not shutil.which("unshare") or not shutil.which("ip"):
        return "unshare (util-linux) or ip (iproute2) is not installed"
    spaces = ["unshare", *(() if os.geteuid() == 0 else ("--user", "--map-root-user"))]
    spaces += ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    tried = subprocess.run([*spaces, "sh", "-c", _SETUP, "sh", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return tried.stderr.strip()
    again = [*spaces, "sh", "-c", _SETUP, "sh", sys.executable, "-m", "migproxy", *sys.argv[1:]]
    return os.execvpe("unshare", again, os.environ | {_SANDBOX: "1"})


class Process:
    """A process whose lines of output are awaited; owns it, and its pipes.

    Args:
        command: What to run.
        log: Where its standard error goes, and is shown from when it fails.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command = list(command)
        self._log = log
        self._rest = b""
        with log.open("ab") as errors:
            self._popen = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
            )
        self.pid = self._popen.pid

    @property
    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def line(self, seconds: float, beside: Process | None = None) -> str:
        """Waits for the next line of its output.

        Args:
            seconds: How long.
            beside: Another process without which the line will not come.

        Raises:
            BenchError: It took longer, or one of the two ended before.
        """
        output: IO[bytes] = self._popen.stdout  # type: ignore[assignment]
        deadline = time.monotonic() + seconds
        poller = select.poll()
        poller.register(output, select.POLLIN)
        while b"\n" not in self._rest:
            if poller.poll(100):
                data = output.read(1 << 16)
                if not data:
                    raise self.failure("ended before it was done")
                self._rest += data
            elif beside and beside.has_ended:
                raise beside.failure("ended before it was done")
            elif time.monotonic() > deadline:
                raise self.failure(f"said nothing for {seconds:g} s")
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode()

    def say(self, line: str) -> None:
        """Writes a line to its input."""
        assert self._popen.stdin
        with suppress(BrokenPipeError):
            self._popen.stdin.write(f"{line}\n".encode())

    def finish(self, seconds: float = 20) -> None:
        """Ends its input, on which it ends by itself.

        Raises:
            BenchError: It failed, or did not end in time.
        """
        assert self._popen.stdin
        self._popen.stdin.close()
        try:
            status = self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not end within {seconds:g} s") from None
        if status:
            raise self.failure(f"exit status {status}")

    def close(self) -> None:
        """Ends it at once unless it has ended, and closes the pipes."""
        if not self.has_ended:
            self._popen.terminate()
            try:
                self._popen.wait(5)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe:
                pipe.close()

    def failure(self, what: str) -> BenchError:
        """The error that says what it did not do, with the end of what it wrote to its standard error."""
        with suppress(OSError):
            words = self._log.read_text(errors="replace").strip().splitlines()[-5:]
            return BenchError("\n  ".join([f"{' '.join(self.command)}: {what}", *words]))
        return BenchError(f"{' '.join(self.command)}: {what}")


@dataclass(frozen=True, slots=True)
class Network:
    """How two nodes are joined.

    Attributes:
        name: "veth" or "loopback".
        source, target: The nodes' addresses.
        target_prefix: The command that enters the target's network namespace; empty where there is one for both.
    """

    name: str
    source: str
    target: str
    target_prefix: tuple[str, ...] = ()


class Stage:
    """Owns the benchmark's folder, its programs and, in a sandbox, a second network namespace behind a veth pair.

    Attributes:
        folder: For sockets, configurations and logs.
        traffic, limit: The compiled programs.
        networks: By name, those that there are.
        default_congestion: The system's congestion control.

    Args:
        sandboxed: Whether this process is in namespaces of its own.

    Raises:
        BenchError: There is no C compiler, or the network cannot be made.
    """

    def __init__(self, *, sandboxed: bool) -> None:
        self._stack = ExitStack()
        self._count = 0
        self.sandboxed = sandboxed
        self.default_congestion = Path(_CONGESTION).read_text().strip()
        try:
            where = "/run" if sandboxed else None  # the sandbox's own: nothing is left, whatever happens
            self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mpb-", dir=where)))
            self.traffic, self.limit = self._compile("traffic"), self._compile("limit")
            self.networks = {LOOPBACK: Network(LOOPBACK, "127.0.0.1", "127.0.0.1")}
            if sandboxed:
                self.networks[VETH] = self._join()
                self._stack.callback(self.use_congestion, None)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def subfolder(self, name: str) -> Path:
        """A new folder with a short path: a unix socket's has 107 bytes at most."""
        self._count += 1
        path = self.folder / f"{self._count}-{name}"
        path.mkdir()
        return path

    def _compile(self, name: str) -> str:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise BenchError("the generator is compiled on this machine and there is no C compiler: install gcc")
        return self._build(f"{name}.c", compiler, "-O2", "-pthread", "-o")

    def _build(self, source: str, *command: str) -> str:
        """Compiles a source of this package with a command that ends with the program's path and the source's."""
        copy = self.folder / source
        copy.write_bytes(files("migproxy.bench").joinpath(source).read_bytes())
        program = str(copy.with_suffix(""))
        environment = os.environ | {"GOCACHE": str(self.folder / "go"), "GO111MODULE": "off"}
        done = subprocess.run([*command, program, str(copy)], capture_output=True, env=environment, check=False)
        if done.returncode:
            raise BenchError(f"{command[0]} cannot compile {source}: {done.stderr.decode(errors='replace').strip()}")
        return program

    @cached_property
    def peer(self) -> str:
        """The compiled program of KubeVirt's kind.

        Raises:
            BenchError: There is no Go compiler, or it refuses.
        """
        compiler = shutil.which("go")
        if compiler is None:
            raise BenchError("there is no Go compiler: install golang-go")
        return self._build("peer.go", compiler, "build", "-o")

    @cached_property
    def certificates(self) -> str:
        """A folder of certificates, as `migproxy certs` makes it.

        Raises:
            BenchError: It does not.
        """
        folder = str(self.subfolder("tls") / "certificates")
        command = [sys.executable, "-m", "migproxy", "certs", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"{shlex.join(command)}: {done.stderr.strip()}")
        return folder

    def _join(self) -> Network:
        holder = Process(["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"], self.folder / "network.log")
        self._stack.callback(holder.close)
        holder.line(10)
        inside = ("nsenter", "-t", str(holder.pid), "--net")
        for command in (
            f"ip link add mpb0 type veth peer name mpb1 netns {holder.pid}",
            "ip addr add 10.77.0.1/24 dev mpb0",
            "ip link set mpb0 up",
        ):
            _do(command.split())
        self._stack.callback(_do, ["ip", "link", "delete", "mpb0"])
        for command in ("ip link set lo up", "ip addr add 10.77.0.2/24 dev mpb1", "ip link set mpb1 up"):
            _do([*inside, *command.split()])
        return Network(VETH, "10.77.0.1", "10.77.0.2", inside)

    def use_congestion(self, algorithm: str | None) -> None:
        """Sets the congestion control of new connections between the nodes, None for the system's default.

        As an attribute of the route: the sysctl is refused in a namespace for what is not in the machine's
        tcp_allowed_congestion_control, and a contestant's own choice (TCP_CONGESTION) would escape it.
        """
        veth = self.networks[VETH]
        chosen = ["congctl", algorithm] if algorithm else []
        for prefix, route in (
            ((), f"10.77.0.0/24 dev mpb0 proto kernel scope link src {veth.source}"),
            (veth.target_prefix, f"10.77.0.0/24 dev mpb1 proto kernel scope link src {veth.target}"),
            ((), "local 127.0.0.0/8 dev lo table local proto kernel scope host src 127.0.0.1"),
            ((), "local 127.0.0.1 dev lo table local proto kernel scope host src 127.0.0.1"),
        ):
            _do([*prefix, "ip", "route", "replace", *route.split(), *chosen])


def _do(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}")


def until(condition: Callable[[], bool], what: str, seconds: float = 20, pause: float = 0.005) -> None:
    """Waits for a condition.

    Raises:
        BenchError: It did not become true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(pause)
