"""Compiling the units that the store lacks: one after the other here, or in workers.

Whichever it is, units are stored in their order, so that the outcomes are the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeAlias

import torch

from vllmc.core import errors
from vllmc.core.errors import VllmcError
from vllmc.core.events import Observer
from vllmc.core.job import Job
from vllmc.core.models.model import Model
from vllmc.core.obtain import Policy, Reader, UnitResult, Wanted, keep
from vllmc.core.torch_compat.config import cxx_candidates, vllmc_overrides
from vllmc.core.workers.frames import Declined, Done, Failed, Order
from vllmc.core.workers.pool import Begun, Died, WorkerPool
from vllmc.core.workers.processes import usable_processors

Steps: TypeAlias = Generator[None, None, None]
"""Yields whenever a unit may have been compiled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbered:
    """A unit to compile, and which it is of all units of the program, those found included."""

    wanted: Wanted
    index: int
    total: int


class Compilation:
    """The units of one program that are compiled, under the configuration in force.

    `waited` are the seconds of wall time in which nothing was done but compile.
    """

    def __init__(
        self,
        units: Sequence[Numbered],
        job: Job,
        reader: Reader,
        observer: Observer,
        policy: Policy,
    ) -> None:
        self.waited = 0.0
        self._units = units
        self._job = job
        self._reader = reader
        self._observer = observer
        self._policy = policy
        self._done: dict[int, Done] = {}
        self._kept: list[UnitResult] = []

    def run(self, pool: WorkerPool | None) -> tuple[UnitResult, ...]:
        """Compiles and stores all units, in their order; in this process without a pool.

        Raises the error of the first unit that cannot be compiled, and `VllmcError`
        (`worker-died`) for one whose worker died twice. What was compiled is stored by then.
        """
        steps = self._here() if pool is None else self._in_workers(pool)
        try:
            with closing(steps):
                waiting = time.perf_counter()
                for _ in steps:
                    self.waited += time.perf_counter() - waiting
                    self._keep_in_order()
                    waiting = time.perf_counter()
        finally:
            for place in sorted(self._done):
                self._keep(place)
        return tuple(self._kept)

    def _here(self) -> Steps:
        for place in range(len(self._units)):
            self._begin(place)
            self._compile_here(place)
            yield

    def _in_workers(self, pool: WorkerPool) -> Steps:
        orders, left = self._orders(pool.jobs)
        failures: dict[int, VllmcError] = {}
        with closing(pool.run([order for _, order in orders])) as events:
            for index, event in events:
                place = orders[index][0]
                label = self._units[place].wanted.label
                match event:
                    case Begun():
                        self._begin(place)
                    case Done():
                        self._done[place] = event
                    case Declined():
                        left[place] = event.reason
                    case Failed():
                        failures[place] = _error(event)
                    case Died(last=False):
                        self._observer.warning(
                            "worker-died",
                            f"the worker that compiled {label} died: {event.cause}",
                            "it is compiled once more, with no other beside it",
                        )
                    case Died():
                        failures[place] = _died_twice(label, event)
                yield
        if failures:
            raise failures[min(failures)]
        for place, reason in sorted(left.items()):
            self._observer.remark(
                f"{self._units[place].wanted.label} is compiled in this process: {reason}"
            )
            self._begin(place)
            self._compile_here(place)
            yield

    def _orders(self, jobs: int) -> tuple[list[tuple[int, Order]], dict[int, str]]:
        """What workers are to do, by the unit's place, and why they cannot do the rest."""
        from vllmc.core.graph.travel import pack_piece

        spec = self._job.spec
        cxx = cxx_candidates(vllmc_overrides(spec))
        at_once = min(jobs, len(self._units))
        found, left = [], dict[int, str]()
        for place, numbered in enumerate(self._units):
            unit = numbered.wanted.unit
            try:
                piece = pack_piece(unit.piece)
            except VllmcError as error:
                left[place] = error.message
                continue
            order = Order(
                piece=piece,
                range=unit.range,
                spec=spec,
                factors=self._job.factors,
                cxx=cxx,
                threads=torch.get_num_threads(),
                compilers=max(1, usable_processors() // at_once),
                path=tuple(sys.path),
                modules=_modules(self._job.model),
                texts=self._policy.texts,
            )
            found.append((place, order))
        return found, left

    def _begin(self, place: int) -> None:
        numbered = self._units[place]
        self._observer.unit_started(numbered.wanted.label, numbered.index, numbered.total)

    def _compile_here(self, place: int) -> None:
        from vllmc.core.compiler.registry import find_compiler

        started = time.perf_counter()
        compiler = find_compiler(self._job.spec.backend)
        compiled = compiler.compile(
            self._units[place].wanted.unit, self._job.spec, texts=self._policy.texts
        )
        self._done[place] = Done(compiled=compiled, seconds=time.perf_counter() - started)

    def _keep_in_order(self) -> None:
        while len(self._kept) in self._done:
            self._keep(len(self._kept))

    def _keep(self, place: int) -> None:
        done = self._done.pop(place)
        wanted = self._units[place].wanted
        result = keep(wanted, done.compiled, done.seconds, self._reader, self._policy)
        self._observer.unit_finished(wanted.label, result.outcome, result.seconds)
        self._kept.append(result)


def _modules(model: Model) -> tuple[str, ...]:
    """The module of a model that is given as `module:attribute`."""
    name, colon, _ = model.name.partition(":")
    return (name,) if colon and model.made_by_code and name in sys.modules else ()


def _error(failed: Failed) -> VllmcError:
    kind = getattr(errors, failed.kind, VllmcError)
    error: VllmcError = kind(failed.code, failed.message, context=failed.context, hint=failed.hint)
    error.__cause__ = RuntimeError(f"in a worker:\n{failed.trace}")
    return error


def _died_twice(label: str, died: Died) -> VllmcError:
    return VllmcError(
        "worker-died",
        f"two workers died that compiled {label}",
        context={"cause": died.cause},
        hint="vllmc warm --jobs 1 compiles in its own process; see that it has memory enough",
    )
