"""One model after the other: several in one call, or the entries of a matrix file.

What cannot be meant as it is written (exit 2) stops all of them before anything is compiled. Of
several, one that fails otherwise does not stop the others. What failed is tried again when all the
others have had their turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vllmc.cli.boundary import unforeseen
from vllmc.cli.interrupts import Interrupted
from vllmc.cli.job import make
from vllmc.cli.matrix import Entry
from vllmc.cli.options import CompileFlags, CompileRequest, compile_request
from vllmc.cli.output import Output
from vllmc.cli.settings import Settings
from vllmc.cli.warm_rows import PREDICTED_CODES, Head, Row, failed_row
from vllmc.core.errors import UsageError, VllmcError
from vllmc.core.events import Observer

if TYPE_CHECKING:
    from vllmc.core.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an entry begins in its matrix file."""

    file: Path
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One model to warm in one way; `place` is None where no matrix file names it."""

    name: str
    request: CompileRequest
    settings: Settings
    place: Place | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a task. `error` is why it failed; of one that did not, why it did before."""

    task: Task
    row: Row
    error: VllmcError | None = None

    @property
    def failure(self) -> VllmcError | None:
        """The error of a task that failed in the end."""
        return self.error if self.row["outcome"] == "failed" else None

    @property
    def exit_code(self) -> int:
        """What the command would exit with if it had this task alone."""
        if self.failure is not None:
            return self.failure.exit_code
        return PREDICTED_CODES.get(self.row["outcome"], 0)


def told_rows(results: Sequence[Result]) -> list[Row]:
    """The rows without the changes that were asked for: from another of these results.

    Where one would miss they stay, as they are all that is known of it.
    """
    keys = {result.row["key"] for result in results}
    return [
        result.row
        if result.exit_code or not (miss := result.row["miss"]) or miss["nearest_key"] not in keys
        else result.row | {"miss": miss | {"nearest_key": None, "changes": []}}
        for result in results
    ]


Attempt: TypeAlias = "Callable[[Job, Head], Row]"
"""Warms or predicts; raises `VllmcError`."""


def named_tasks(settings: Settings, flags: CompileFlags, models: Sequence[str]) -> tuple[Task, ...]:
    """The models of a command line. Raises `UsageError` for what cannot be meant."""
    return tuple(
        Task(name=model, request=compile_request(settings, flags, model), settings=settings)
        for model in models
    )


def matrix_tasks(
    settings: Settings, flags: CompileFlags, entries: Iterable[Entry]
) -> tuple[Task, ...]:
    """The entries of a matrix file: flags beat what they say, and that the environment and config.

    Raises `UsageError` for what cannot be meant.
    """
    tasks = []
    for entry in entries:
        merged = replace(settings, entry=entry.config)
        tasks.append(
            Task(
                name=entry.name,
                request=compile_request(merged, flags, entry.model),
                settings=merged,
                place=Place(file=entry.config.path, line=entry.line),
            )
        )
    return tuple(tasks)


class Batch:
    """The tasks of one call and their jobs, as far as these could be made.

    Raises what keeps a job from being made; of a matrix file's entry `UsageError` alone, for the
    rest may be gone at the next attempt.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._made = [_make(task) for task in tasks]
        self._results: dict[int, Result] = {}

    @property
    def several(self) -> bool:
        """Whether there may be more than one: a matrix file is a list also of one."""
        return len(self._tasks) > 1 or self._tasks[0].place is not None

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that could be made."""
        return tuple(job for job in self._made if not isinstance(job, VllmcError))

    @property
    def results(self) -> tuple[Result, ...]:
        """What became of the tasks, in their order; of those that had no turn, an interrupt."""
        return tuple(
            self._results.get(index) or self._failed(index, 0, Interrupted())
            for index in range(len(self._tasks))
        )

    def run(self, attempt: Attempt, observer: Observer, output: Output, *, retries: int) -> None:
        """Attempts each task once, then up to `retries` times what failed."""
        results = self._results
        todo: Sequence[int] = range(len(self._tasks))
        for attempts in range(1, retries + 2):
            for index in todo:
                if len(self._tasks) > 1:
                    again = f", attempt {attempts}" if attempts > 1 else ""
                    place = f"[{index + 1}/{len(self._tasks)}]"
                    observer.stage(f"{place} {self._tasks[index].name}{again}")
                before = results[index].error if index in results else None
                results[index] = self._attempt(index, attempts, attempt, before)
                if self.several and (error := results[index].failure) is not None:
                    output.complain(error)
            todo = [index for index in todo if _may_pass(results[index])]

    def _attempt(
        self, index: int, attempts: int, attempt: Attempt, before: VllmcError | None
    ) -> Result:
        task = self._tasks[index]
        job = self._made[index]
        head = Head(name=task.name, attempts=attempts)
        try:
            if isinstance(job, VllmcError) and attempts > 1:
                job = self._made[index] = _make(task)
            if isinstance(job, VllmcError):
                raise job
            return Result(task=task, row=attempt(job, head), error=before)
        except Exception as error:  # noqa: BLE001 - the edge of one task, which is not to stop others
            return self._failed(index, attempts, _known(error))

    def _failed(self, index: int, attempts: int, error: VllmcError) -> Result:
        task, job = self._tasks[index], self._made[index]
        head = Head(name=task.name, attempts=attempts)
        row = failed_row(head, task.request.model, None, error)
        if not isinstance(job, VllmcError):
            row = failed_row(head, job.model.name, job.key, error)
        return Result(task=task, row=row, error=error)


def _make(task: Task) -> Job | VllmcError:
    try:
        return make(task.settings, task.request)
    except UsageError:
        raise
    except Exception as error:
        if task.place is None:
            raise
        return _known(error)


def _known(error: Exception) -> VllmcError:
    """What is told of an error. Raises that nobody reads any more what is told."""
    if isinstance(error, BrokenPipeError):
        raise error
    if isinstance(error, VllmcError):
        return error
    known = unforeseen(error)
    known.__cause__ = error
    return known


def _may_pass(result: Result) -> bool:
    """Whether the task failed for what another attempt may not meet."""
    return result.failure is not None and result.exit_code == VllmcError.exit_code
