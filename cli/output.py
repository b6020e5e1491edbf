"""The one output sink: data to stdout, everything else to stderr. Imports no torch.

What shows to be a secret by its shape is redacted from complaints, whoever worded them.

Rich adapts to a terminal's width and honours NO_COLOR; what is piped is plain and never wrapped.
"""

from __future__ import annotations

import errno
import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from vllmc.cli.interrupts import remembered_interrupts
from vllmc.cli.render import duration
from vllmc.core.cache.redaction import scrub
from vllmc.core.errors import VllmcError
from vllmc.core.events import Observer, SilentObserver, UnitOutcome

SCHEMA_VERSION = 1
_UNWRAPPED = 100_000


class _Console(Console):
    """A console that leaves a closed pipe to the error boundary instead of ending the process."""

    def on_broken_pipe(self) -> None:
        """Raises `BrokenPipeError`."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr: plain and unwrapped where that is no terminal."""
    console = _Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNWRAPPED
    return console


class Output:
    """Where the command called `command` (`cache ls`) puts what it has to say.

    `verbosity` is -1 with `-q`, else the number of `v`s.
    """

    def __init__(
        self,
        *,
        command: str,
        json: bool = False,
        verbosity: int = 0,
        stdout: Console | None = None,
        stderr: Console | None = None,
    ) -> None:
        self.command = command
        self.verbosity = verbosity
        self._json = json
        self._stdout = stdout or make_console()
        self._stderr = stderr or make_console(stderr=True)

    def data(
        self, payload: Mapping[str, object], render: Callable[[], RenderableType | str]
    ) -> None:
        """Prints the command's result, once: `payload` under `--json`, else what `render` returns.

        The schema version and the command's name are added to `payload`. Rendered text is printed
        as it is; a renderable is fitted to the terminal.
        """
        if self._json:
            self._print_json(payload)
            return
        rendered = render()
        self._stdout.print(rendered, soft_wrap=isinstance(rendered, str))

    def warn(self, code: str, message: str, hint: str = "") -> None:
        """Prints a warning on stderr, also with `-q`."""
        self._complain("warning", "yellow", code, message)
        self._hint(hint)

    def note(self, text: str, *, level: int = 0) -> None:
        """Prints a remark on stderr; `level` 1 and 2 take `-v` and `-vv`."""
        if self.verbosity >= level:
            self._stderr.print(Text(scrub(text), style="dim"))

    def error(self, error: VllmcError) -> None:
        """Prints an error: on stderr, with `--json` also as the object on stdout."""
        self._complain("error", "bold red", error.code, error.message)
        for name, value in error.context.items():
            self._stderr.print(Text(f"  {name}: {scrub(_plain(value))}"))
        self._hint(error.hint)
        if self.verbosity >= 2:
            lines = traceback.format_exception(error)
            self._stderr.print(Text(scrub("".join(lines)).rstrip()))
        if self._json:
            fields = {
                "code": error.code,
                "message": scrub(error.message),
                "context": {name: _scrubbed(value) for name, value in error.context.items()},
                "hint": scrub(error.hint),
            }
            self._print_json({"error": fields})

    @contextmanager
    def progress(self) -> Iterator[Observer]:
        """An observer that shows progress on stderr.

        A bar on a terminal, lines elsewhere, nothing with `-q`; warnings are always printed.
        """
        with remembered_interrupts() as check:
            if self.verbosity < 0:
                yield _Quiet(self, check)
            elif self._stderr.is_interactive:
                bar = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=24),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    console=self._stderr,
                    transient=True,
                )
                with bar:
                    yield _Bar(self, check, bar)
            else:
                yield _Lines(self, check)

    def _print_json(self, payload: Mapping[str, object]) -> None:
        header = {"schema_version": SCHEMA_VERSION, "command": self.command}
        text = json.dumps({**header, **payload}, allow_nan=False, default=str)
        self._stdout.file.write(text + "\n")
        self._stdout.file.flush()

    def _complain(self, kind: str, style: str, code: str, message: str) -> None:
        self._stderr.print(Text.assemble((kind, style), f"[{code}]: {scrub(message)}"))

    def _hint(self, hint: str) -> None:
        if hint:
            self._stderr.print(Text.assemble(("  hint: ", "bold"), scrub(hint)))


def _scrubbed(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_scrubbed(item) for item in value]
    if isinstance(value, dict):
        return {_scrubbed(name): _scrubbed(item) for name, item in value.items()}
    return value if value is None or isinstance(value, int | float) else scrub(str(value))


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


class _Quiet(SilentObserver):
    """Shows warnings only. Raises an interrupt that was lost, between units and stages."""

    def __init__(self, output: Output, check: Callable[[], None]) -> None:
        self._output = output
        self._check = check

    def stage(self, name: str) -> None:
        """Checks for an interrupt."""
        super().stage(name)
        self._check()

    def unit_started(self, name: str, index: int, total: int) -> None:
        """Checks for an interrupt."""
        super().unit_started(name, index, total)
        self._check()

    def warning(self, code: str, message: str, hint: str = "") -> None:
        """Prints the warning."""
        self._output.warn(code, message, hint)


class _Lines(_Quiet):
    """Shows progress as lines, for logs."""

    def __init__(self, output: Output, check: Callable[[], None]) -> None:
        super().__init__(output, check)
        self._place = ""

    def stage(self, name: str) -> None:
        """Prints the stage."""
        super().stage(name)
        self._output.note(name)

    def unit_started(self, name: str, index: int, total: int) -> None:
        """Remembers which of how many it is; prints it with `-v`."""
        super().unit_started(name, index, total)
        self._place = f"[{index + 1}/{total}]"
        self._output.note(f"{self._place} {name}", level=1)

    def unit_finished(self, name: str, outcome: UnitOutcome, seconds: float) -> None:
        """Prints the unit, its outcome and time."""
        self._output.note(f"{self._place} {name}: {outcome}, {duration(seconds)}")

    def waiting(self, what: str) -> None:
        """Prints what is waited for."""
        self._output.note(f"waiting: {what}")


class _Bar(_Quiet):
    """Shows progress as a bar that is gone at the end."""

    def __init__(self, output: Output, check: Callable[[], None], bar: Progress) -> None:
        super().__init__(output, check)
        self._bar = bar
        self._task = bar.add_task("starting", total=None)

    def stage(self, name: str) -> None:
        """Shows the stage beside the bar."""
        super().stage(name)
        self._bar.update(self._task, description=name)

    def unit_started(self, name: str, index: int, total: int) -> None:
        """Shows the unit, and how many are done."""
        super().unit_started(name, index, total)
        self._bar.update(self._task, description=name, completed=index, total=total)

    def unit_finished(self, name: str, outcome: UnitOutcome, seconds: float) -> None:
        """Moves the bar on by one unit; says with `-v` what became of it."""
        self._output.note(f"{name}: {outcome}, {duration(seconds)}", level=1)
        self._bar.advance(self._task)

    def waiting(self, what: str) -> None:
        """Shows what is waited for beside the bar."""
        self._bar.update(self._task, description=f"waiting: {what}")
