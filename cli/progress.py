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
        self._places: dict[str, str] = {}

    def stage(self, name: str) -> None:
        """Prints the stage."""
        super().stage(name)
        self._output.note(name)

    def unit_started(self, name: str, index: int, total: int) -> None:
        """Remembers which of how many it is; prints it with `-v`."""
        super().unit_started(name, index, total)
        self._places[name] = f"[{index + 1}/{total}]"
        self._output.note(f"{self._places[name]} {name}", level=1)

    def unit_finished(self, name: str, outcome: UnitOutcome, seconds: float) -> None:
        """Prints the unit, its outcome and time."""
        self._output.note(f"{self._places[name]} {name}: {outcome}, {duration(seconds)}")

    def remark(self, text: str) -> None:
        """Prints the remark with `-v`."""
        self._output.note(text, level=1)

    def waiting(self, what: str) -> None:
        """Prints what is waited for."""
        self._output.note(f"waiting: {what}")


class _Bar(_Quiet):
    """Shows progress as a bar that is gone at the end."""

    def __init__(self, output: Output, check: Callable[[], None], bar: Progress) -> None:
        super().__init__(output, check)
        self._bar = bar
        self._task = bar.add_task("starting", total=None)
        self._at_work: list[str] = []

    def stage(self, name: str) -> None:
        """Shows the stage beside a bar that is empty again."""
        super().stage(name)
        self._at_work.clear()
        self._bar.update(self._task, description=name, completed=0, total=None)

    def unit_started(self, name: str, index: int, total: int) -> None:
        """Shows the units at work."""
        super().unit_started(name, index, total)
        if name not in self._at_work:
            self._at_work.append(name)
        self._bar.update(self._task, description=self._named(), total=total)

    def unit_finished(self, name: str, outcome: UnitOutcome, seconds: float) -> None:
        """Moves the bar on by one unit, whichever; says with `-v` what became of it."""
        self._output.note(f"{name}: {outcome}, {duration(seconds)}", level=1)
        self._at_work.remove(name)
        self._bar.update(self._task, advance=1, description=self._named() or name)

    def remark(self, text: str) -> None:
        """Prints the remark with `-v`."""
        self._output.note(text, level=1)

    def waiting(self, what: str) -> None:
        """Shows what is waited for beside the bar."""
        self._bar.update(self._task, description=f"waiting: {what}")

    def _named(self) -> str:
        """The units at work: the first of them, and how many others."""
        first, *others = self._at_work or [""]
        return f"{first} and {len(others)} more" if others else first
