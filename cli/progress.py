"""Progress on stderr: a bar on a terminal, lines in a log. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllmc.cli.interrupts import remembered_interrupts
from vllmc.cli.output import Output
from vllmc.cli.render import duration
from vllmc.core.events import Observer, SilentObserver, UnitOutcome


@contextmanager
def shown_on(console: Console, output: Output) -> Iterator[Observer]:
    """An observer that shows progress on `console`, as much as `output`'s verbosity asks for."""
    with remembered_interrupts() as check:
        if output.verbosity < 0:
            yield _Quiet(output, check)
        elif console.is_interactive:
            bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            with bar:
                yield _Bar(output, check, bar)
        else:
            yield _Lines(output, check)


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
