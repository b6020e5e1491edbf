"""The one output sink: data to stdout, everything else to stderr. Imports no torch.

What shows to be a secret by its shape is redacted from complaints, whoever worded them.

Rich adapts to a terminal's width and honours NO_COLOR; what is piped is plain and never wrapped.
Control characters are escaped, so that no data tells a terminal what to do.
"""

from __future__ import annotations

import errno
import json
import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    RenderableType,
    RenderHook,
    RenderResult,
)
from rich.segment import Segment
from rich.text import Text

from vllmc.core.cache.redaction import scrub
from vllmc.core.errors import VllmcError
from vllmc.core.events import Observer

SCHEMA_VERSION = 1
_UNWRAPPED = 100_000


# What a terminal obeys, and what no encoding has: a cache that others write to may hold it.
_ILLEGIBLE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")


@dataclass(frozen=True, slots=True)
class _Legible:
    """What is printed, with an escape for each character that is none to read."""

    whole: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.whole, options):
            if segment.control is None:
                text = _ILLEGIBLE.sub(lambda found: ascii(found[0])[1:-1], segment.text)
                segment = Segment(text, segment.style)
            yield segment


class _AllLegible(RenderHook):
    """Has all that a console prints `_Legible`."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """See `RenderHook.process_renderables`."""
        return [_Legible(renderable) for renderable in renderables]


class _Console(Console):
    """A console that leaves a closed pipe to the error boundary instead of ending the process."""

    def on_broken_pipe(self) -> None:
        """Raises `BrokenPipeError`."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr: plain and unwrapped where that is no terminal."""
    console = _Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    console.push_render_hook(_AllLegible())
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
        self.complain(error)
        if self._json:
            self._print_json({"error": error_fields(error)})

    def complain(self, error: VllmcError) -> None:
        """Prints an error on stderr; with `-vv` also where it was raised."""
        self._complain("error", "bold red", error.code, error.message)
        for name, value in error.context.items():
            self._stderr.print(Text(f"  {name}: {scrub(_plain(value))}"))
        self._hint(error.hint)
        if self.verbosity >= 2:
            lines = traceback.format_exception(error)
            self._stderr.print(Text(scrub("".join(lines)).rstrip()))

    def commands(self, lines: Iterable[str]) -> None:
        """Prints on stderr, also with `-q`, lines that a program reads there, as they are."""
        for line in lines:
            self._stderr.file.write(f"{line}\n")
        self._stderr.file.flush()

    def progress(self) -> AbstractContextManager[Observer]:
        """An observer that shows progress on stderr.

        A bar on a terminal, lines elsewhere, nothing with `-q`; warnings are always printed.
        """
        from vllmc.cli.progress import shown_on

        return shown_on(self._stderr, self)

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


def error_fields(error: VllmcError) -> dict[str, object]:
    """An error as JSON has it."""
    return {
        "code": error.code,
        "message": scrub(error.message),
        "context": {name: _scrubbed(value) for name, value in error.context.items()},
        "hint": scrub(error.hint),
    }


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
