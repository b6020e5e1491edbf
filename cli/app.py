"""The command line: which commands there are, and the one error boundary. Imports no torch.

`main` turns every error into a message and an exit code; nothing else catches broadly. A command
returns its exit code, or None for 0.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.core import TyperGroup

from vllmc.cli.boundary import unforeseen
from vllmc.cli.commands import Markup, make_group
from vllmc.cli.interrupts import Interrupted
from vllmc.core.errors import UsageError, VllmcError

PIPE_CLOSED = 141


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"vllmc {version('vllmc')}")
        raise typer.Exit


def _root(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Compile LLMs ahead of time, and know why the compile cache hits or misses."""
    _help_without_command(context)


def _cache(context: typer.Context) -> None:
    """Look into the cache, check it, and make it smaller."""
    _help_without_command(context)


def _trust(context: typer.Context) -> None:
    """Say whose signed records are used."""
    _help_without_command(context)


def _help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        with contextlib.redirect_stdout(sys.stderr):
            typer.echo(context.get_help())
        raise typer.Exit(UsageError.exit_code)


def build_app(*, rich_help: bool = False) -> TyperGroup:
    """All commands; `rich_help` draws the help pages with boxes and colours."""
    markup: Markup = "rich" if rich_help else None
    cache = {
        "ls": "vllmc.cli.cache:ls",
        "show": "vllmc.cli.cache:show",
        "stats": "vllmc.cli.cache:stats",
        "verify": "vllmc.cli.cache:verify",
        "export": "vllmc.cli.bundles:export",
        "import": "vllmc.cli.bundles:import_",
        "check-bundle": "vllmc.cli.bundles:check_bundle",
        "prune": "vllmc.cli.prune:prune",
        "push": "vllmc.cli.remotes:push",
        "pull": "vllmc.cli.remotes:pull",
        "path": "vllmc.cli.cache:path",
    }
    trust = {
        "add": "vllmc.cli.trust:add",
        "ls": "vllmc.cli.trust:ls",
        "rm": "vllmc.cli.trust:rm",
        "keygen": "vllmc.cli.trust:keygen",
    }
    commands: dict[str, str | TyperGroup] = {
        "warm": "vllmc.cli.warm:warm",
        "inspect-key": "vllmc.cli.inspect_key:inspect_key",
        "diff-config": "vllmc.cli.diff_config:diff_config",
        "run": "vllmc.cli.run:run",
        "recompiles": "vllmc.cli.recompiles:recompiles",
        "models": "vllmc.cli.models:models",
        "doctor": "vllmc.cli.doctor:doctor",
        "cache": make_group("cache", _cache, cache, markup=markup),
        "trust": make_group("trust", _trust, trust, markup=markup),
    }
    return make_group("vllmc", _root, commands, markup=markup)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's) and returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run(build_app(rich_help=sys.stdout.isatty()), words)


def run(root: TyperGroup, words: Sequence[str]) -> int:
    """Runs a command of `root` inside the error boundary and returns the exit code."""
    try:
        with root.make_context("vllmc", list(words)) as context:
            code = root.invoke(context)
        sys.stdout.flush()
        return code or 0
    except typer.Exit as stop:
        return stop.exit_code
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the one error boundary
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            _abandon_stdout()
            return PIPE_CLOSED
        return _report(error, root, words)


def entry_point() -> None:
    """The console script `vllmc`."""
    # torch's import makes a million objects, none of them garbage. To look for some among them
    # takes 0.07 s each time, and a third of a second at exit.
    gc.set_threshold(100_000, 20, 20)
    code = main()
    if not _triton_counts_what_is_left():
        gc.freeze()
    sys.exit(code)


def _triton_counts_what_is_left() -> bool:
    """Whether Triton is here and bound by nanobind (3.9, with torch 2.15).

    That prints thirty lines at exit where its types are never collected.
    """
    binding = sys.modules.get("triton._C.libtriton.ir")
    return type(getattr(binding, "module", None)).__module__ == "nanobind"


def _report(error: BaseException, root: TyperGroup, words: Sequence[str]) -> int:
    from vllmc.cli.output import Output

    command = _command_name(root, words)
    known = _as_vllmc_error(error, command)
    if known is not error:
        known.__cause__ = error
    # The error may have come before the words were parsed.
    flags = words[: words.index("--")] if "--" in words else words
    output = Output(
        command=command,
        json="--json" in flags,
        verbosity=sum(len(word) - 1 for word in flags if word in ("-v", "-vv")),
    )
    try:
        output.error(known)
        sys.stdout.flush()
    except OSError:
        _abandon_stdout()
    return known.exit_code


def _command_name(root: TyperGroup, words: Sequence[str]) -> str:
    names: list[str] = []
    group: object = root
    for word in words:
        if not isinstance(group, TyperGroup) or word not in group.commands:
            break
        names.append(word)
        group = group.commands[word]
    return " ".join(names) or "vllmc"


def _as_vllmc_error(error: BaseException, command: str) -> VllmcError:
    if isinstance(error, VllmcError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted()
    if isinstance(error, typer.TyperException):
        name = command if command == "vllmc" else f"vllmc {command}"
        return UsageError("usage", error.format_message(), hint=f"see {name} --help")
    return unforeseen(error)


def _nobody_reads() -> bool:
    """Whether it is stdout that is closed, and not some pipe inside the computation."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _abandon_stdout() -> None:
    """Keeps the interpreter from failing once more when it flushes stdout at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
