"""The command line. Each command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NoReturn

import typer

from migproxy import __version__
from migproxy import settings as options
from migproxy.imports import uncollected
from migproxy.portmap import LAUNCHER_RUN_DIR, migration_uris, virsh_command
from migproxy.text import printable

app = typer.Typer(
    name="migproxy",
    help="KubeVirt's live-migration proxy as a node daemon of its own.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"migproxy {__version__}")
        raise typer.Exit


_CONTROL_SOCKET = typer.Option(
    "--control-socket", envvar="MIGPROXY_CONTROL_SOCKET", help="The control socket of the daemon to ask."
)
_DEFAULT_CONTROL_SOCKET = str(options.Settings.model_fields["control_socket"].default)


def _complain(message: str) -> None:
    typer.echo(printable(f"migproxy: {message}", keep="\n"), err=True)


def _fail(message: str, status: int = 1) -> NoReturn:
    _complain(message)
    raise typer.Exit(status)


_CONFIG = typer.Option("--config", envvar="MIGPROXY_CONFIG", help="The daemon's TOML file of options.")


def _load(
    invocation: typer.Context, config: str | None, flags: dict[str, Any]
) -> tuple[options.Settings, Callable[[], options.Settings]]:
    """Checks the options that were given, or ends the program; returns them, and what reads them again."""
    given = {name: value for name, value in flags.items() if value not in (None, False)}
    origins = {name: _origin(invocation, name) for name in given}

    def read() -> options.Settings:
        return options.load(given, origins, config)

    try:
        return read(), read
    except options.SettingsError as error:
        _fail(str(error), 2)


def _origin(invocation: typer.Context, field: str) -> str:
    source = invocation.get_parameter_source(field)
    if source is not None and source.name == "ENVIRONMENT":
        return " or ".join(options.variables(field))
    return options.option(field)


def _run(invocation: typer.Context, config: Annotated[str | None, _CONFIG] = None, **flags: Any) -> None:
    """Run the daemon of one node."""
    settings, read = _load(invocation, config, flags)

    with uncollected():
        import faulthandler

        import uvloop

        from migproxy import logs
        from migproxy.control import ControlError
        from migproxy.daemon import serve
        from migproxy.inventory import InventoryError
        from migproxy.lifeline import LifelineError
        from migproxy.security import SecurityError
        from migproxy.watch import WatchError
        from migproxy.web import HTTPError

    faulthandler.enable()  # a watchdog ends a process that hangs by SIGABRT: every thread then says where it is
    logs.configure(settings.log_format, settings.log_level)
    logs.hear_libraries()
    try:
        uvloop.run(serve(settings, read))
    except (SecurityError, ControlError, HTTPError, InventoryError, LifelineError, WatchError) as error:
        _fail(str(error))


def _command(function: Callable[..., None], fields: Iterable[str]) -> Any:
    """Makes a command that has some of the daemon's options besides its own: text here, checked there."""
    signature = inspect.signature(function, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [*own[:1], *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own[1:])]
    return _with_parameters(function, parameters + [_setting(name) for name in fields])


def _with_parameters(function: Callable[..., None], parameters: list[inspect.Parameter]) -> Any:
    def run(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = function.__doc__
    return run


def _setting(name: str) -> inspect.Parameter:
    field = options.Settings.model_fields[name]
    is_flag = field.annotation is bool
    has_default = not (is_flag or not field.default or field.default_factory)
    option = typer.Option(
        options.option(name),
        envvar=options.variables(name),
        help=(field.description or "") + (f" Default: {_text(field.default)}." if has_default else ""),
        show_default=False,
        show_envvar=True,
    )
    return _parameter(name, bool if is_flag else str | None, option)


def _text(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    default = False if kind is bool else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


app.command("run")(_command(_run, options.Settings.model_fields))


_WATCHED_OVER = (
    "node_name",
    "kubeconfig",
    "context",
    "launcher_run_dir",
    "pods_dir",
    "socket_owner",
    "control_socket",
    "log_format",
    "log_level",
)
"""The daemon's options that `migproxy failsafe` has too."""


def _failsafe(invocation: typer.Context, config: Annotated[str | None, _CONFIG] = None, **flags: Any) -> None:
    """Give what has not begun back to virt-handler while the daemon beside it is dead. Takes the daemon's options."""
    settings, _ = _load(invocation, config, flags)
    from migproxy import logs
    from migproxy.failsafe import FailsafeError, run

    logs.configure(settings.log_format, settings.log_level)
    try:
        run(settings)
    except FailsafeError as error:
        _fail(str(error))


app.command("failsafe")(_command(_failsafe, _WATCHED_OVER))


@app.command()
def relay(
    socket: Annotated[
        str, typer.Option("--relay-socket", envvar="MIGPROXY_RELAY_SOCKET", help="Where daemons reach it.")
    ] = options.Settings(control_socket=_DEFAULT_CONTROL_SOCKET).relay_path,
) -> None:
    """Move the bytes of a daemon's connections; the daemon starts one by itself where nobody else does."""
    # Another process image: the relay is small, and lives long.
    os.execv(sys.executable, [sys.executable, "-m", "migproxy.relay", socket])  # noqa: S606


@app.command()
def status(
    control_socket: Annotated[str, _CONTROL_SOCKET] = _DEFAULT_CONTROL_SOCKET,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, as JSON.")] = False,
) -> None:
    """Show the migrations of the running daemon."""
    from migproxy import control
    from migproxy.status import render

    try:
        report = control.ask(control_socket)
    except control.ControlError as error:
        _fail(str(error))
    typer.echo(json.dumps(report, indent=2) if as_json else render(report))


@app.command()
def top(
    control_socket: Annotated[str, _CONTROL_SOCKET] = _DEFAULT_CONTROL_SOCKET,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two pictures.")] = 1.0,
    sort: Annotated[str, typer.Option("--sort", help="rate, total, age or name.")] = "rate",
) -> None:
    """Show the migrations of the running daemon live; not on a terminal, one picture of them."""
    from migproxy import control
    from migproxy.top import SORTS, run

    if sort not in SORTS.values():
        _fail(f"--sort {sort}: there are {', '.join(SORTS.values())}", 2)
    try:
        run(lambda: control.ask(control_socket), interval, sort)
    except control.ControlError as error:
        _fail(str(error))


_EXAMINED = (
    "migration_interface",
    "migration_address",
    "pod_ip",
    "publish_status",
    "port_range",
    "launcher_run_dir",
    "pods_dir",
    "congestion_control",
    "disable_tls",
    "tls_dir",
    "tls_cert",
    "tls_key",
    "tls_server_dir",
    "tls_client_dir",
    "tls_ca",
    "kubeconfig",
    "context",
    "kubevirt_namespace",
    "control_socket",
    "relay_socket",
    "relay_externally_managed",
)
"""The daemon's options that `migproxy doctor` has too."""


def _doctor(
    invocation: typer.Context,
    config: Annotated[str | None, _CONFIG] = None,
    peer: Annotated[
        str | None, typer.Option("--peer", help="Check the path to this migration address, where --serve runs.")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Answer another node's --peer, until interrupted.")] = False,
    peer_port: Annotated[
        int, typer.Option("--peer-port", min=1, max=65534, help="For both; the next is used too.")
    ] = 9471,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="To measure the throughput for.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    **flags: Any,
) -> None:
    """Check this node, and the path to another one; say what to do. Exit status 1 where a check failed."""
    settings, _ = _load(invocation, config, flags)
    from migproxy.doctor import command

    request = command.Request(settings, peer, peer_port, seconds)
    try:
        raise typer.Exit(command.serve(request) if serve else command.examine(request, as_json=as_json))
    except command.PeerError as error:
        _fail(str(error))


app.command("doctor")(_command(_doctor, _EXAMINED))


@app.command()
def certs(
    directory: Annotated[str, typer.Argument(help="Folder to make them in; --tls-dir takes it.")],
    days: Annotated[int, typer.Option("--days", min=1, help="How long they are good for.")] = 365,
) -> None:
    """Make a CA and a pair of certificates with KubeVirt's names, to try mTLS with."""
    from migproxy.devcerts import make

    try:
        make(directory, days)
    except OSError as error:
        _fail(f"{error.filename or directory}: {error.strerror}: choose a new folder")
    typer.echo(
        f"{directory}: ca.crt, ca.key, and server/ and client/ with tls.crt and tls.key each, for {days} days\n"
        f"copy ca.crt, server and client to the other node, and run both with --tls-dir {directory}"
    )


@app.command()
def uri(
    file: Annotated[str, typer.Argument(help="File that holds the VMI, in YAML or JSON; - for standard input.")],
    vmi: Annotated[str | None, typer.Option("--vmi", help="NAMESPACE/NAME, where the file holds several.")] = None,
    connect: Annotated[
        str | None,
        typer.Option("--connect", "-c", help="The source libvirt's URI for virsh. Default: its local socket."),
    ] = None,
    run_dir: Annotated[
        str, typer.Option("--run-dir", help="/var/run as the source libvirt and QEMU see it.")
    ] = LAUNCHER_RUN_DIR,
    session: Annotated[bool, typer.Option("--session", help="A non-root launcher: qemu:///session.")] = False,
    domain: Annotated[str | None, typer.Option("--domain", help="libvirt's name. Default: NAMESPACE_NAME.")] = None,
    parallel: Annotated[
        int, typer.Option("--parallel-connections", min=0, help="Connections for the memory (multifd); 0: one stream.")
    ] = 0,
    only_uris: Annotated[bool, typer.Option("--uris", help="Print the three URIs, one a line, instead.")] = False,
) -> None:
    """Print the virsh command that migrates a VMI by hand, through the source proxy's sockets."""
    from migproxy.inventory.contents import EMPTY, SyntaxFlaw
    from migproxy.inventory.document import read

    try:
        with open(0 if file == "-" else file, encoding="utf-8") as text:
            contents = read(text.read(), EMPTY)
    except SyntaxFlaw as error:
        _fail(f"{file}: {error}" if error.line is None else f"{file}:{error.line}: {error}")
    except (OSError, UnicodeDecodeError) as error:
        _fail(f"{file}: {error}")
    for flaw in contents.flaws:
        _complain(f"{file}:{flaw.line}: {flaw.reason}")
    found = [entry.vmi for entry in contents.entries]
    if vmi is not None:
        found = [one for one in found if f"{one.namespace}/{one.name}" == vmi]
    if len(found) != 1:
        names = ", ".join(f"{one.namespace}/{one.name}" for one in found[:20]) + (", ..." if found[20:] else "")
        _fail(f"{file}: " + (f"holds several VMIs, choose with --vmi: {names}" if found else "holds no such VMI"))
    try:
        uris = migration_uris(run_dir, found[0].source_key(), session=session)
    except ValueError as error:
        _fail(str(error))
    if only_uris:
        typer.echo(f"{uris.destination}\n{uris.migration}\n{uris.disks}")
        return
    command = virsh_command(
        uris,
        domain or found[0].domain(),
        connect=connect or f"qemu:///{'session' if session else 'system'}",
        parallel=parallel,
        copy_storage=found[0].uses_block(),
    )
    typer.echo(shlex.join(command))


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="A short run: less certain, a minute instead of five.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="How often the contestants take turns. Default: 7.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.05, help="How long each stream lasts. Default: 0.4.")] = None,
    connections: Annotated[str | None, typer.Option(help="Streams at once. Default: 1,2,8,32.")] = None,
    size: Annotated[str | None, typer.Option(help="Bytes of each write. Default: 131072,32768,1048576.")] = None,
    network: Annotated[str | None, typer.Option(help="Default: veth,loopback.")] = None,
    congestion: Annotated[
        str | None, typer.Option(help="cubic for all, or system: what each chooses by itself. Default: cubic,system.")
    ] = None,
    contestants: Annotated[str | None, typer.Option(help="Their names. Default: all that are installed.")] = None,
    source_command: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=COMMAND: a further contestant's relay from a unix socket to TCP; may use {source} (the socket), "
            "{address} and {port} (to connect to), {folder}. Again for more."
        ),
    ] = None,
    target_command: Annotated[
        list[str] | None,
        typer.Option(help="NAME=COMMAND: its relay from TCP, {address} and {port}, to a unix socket, {target}."),
    ] = None,
    growth: Annotated[
        int | None, typer.Option(min=0, help="Migrations at once, to see how it grows; 0: none. Default: 100.")
    ] = None,
    as_json: Annotated[str | None, typer.Option("--json", help="File to write all values to.")] = None,
    chart: Annotated[str | None, typer.Option("--chart", help="File to draw the streams in, as SVG.")] = None,
) -> None:
    """Compare migproxy with other relays, and with the limit, on this machine."""
    from migproxy.bench import command
    from migproxy.bench.options import make_plan
    from migproxy.bench.stage import BenchError

    try:
        plan = make_plan(
            quick=quick,
            numbers={"rounds": rounds, "seconds": seconds, "migrations": growth},
            lists={
                "connections": connections,
                "sizes": size,
                "networks": network,
                "congestion": congestion,
                "contestants": contestants,
            },
            commands=(source_command or [], target_command or []),
            files={"json": as_json, "chart": chart},
        )
        complete = command.run(plan, typer.echo)
    except BenchError as error:
        _fail(str(error))
    if not complete:
        raise typer.Exit(3)
