"""Compiling the units that the store lacks: one after the other here, or in workers.

Whichever it is, units are stored in their order, so that the outcomes are the same. A unit is
compiled under its lease. What another process holds is put off until all else is stored and let go
of, so that no two processes wait for each other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeAlias

import torch

from vllmc.core import errors
from vllmc.core.cache.lease import POLL_SECONDS, Lease
from vllmc.core.errors import VllmcError
from vllmc.core.events import Observer
from vllmc.core.job import Job
from vllmc.core.models.model import Model
from vllmc.core.obtain import Policy, Reader, UnitResult, Wanted, keep, stored
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

    `waited` are the seconds of wall time in which nothing was done but compile, or wait for another
    process that does.
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
        self._requests = [reader.store.request(numbered.wanted.key) for numbered in units]
        self._leases: dict[int, Lease] = {}
        self._ours: list[int] = []
        self._done: dict[int, Done] = {}
        self._results: dict[int, UnitResult] = {}

    def run(self, pool: WorkerPool | None) -> tuple[UnitResult, ...]:
        """Compiles and stores all units, in their order; in this process without a pool.

        A unit that another process stores meanwhile is found. Raises the error of the first unit
        that cannot be compiled, `VllmcError` (`worker-died`) for one whose worker died twice, and
        what taking a lease raises. What was compiled is stored by then.
        """
        places = list(range(len(self._units)))
        try:
            while places:
                self._round(places, pool)
                places = [place for place in places if place not in self._results]
                if places:
                    self._wait(places)
        finally:
            for lease in self._leases.values():
                lease.release()
        return tuple(self._results[place] for place in range(len(self._units)))

    def _round(self, places: list[int], pool: WorkerPool | None) -> None:
        """Compiles those of the units that no other process holds."""
        self._ours = list(places)
        steps = self._here(places) if pool is None else self._in_workers(places, pool)
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

    def _wait(self, places: list[int]) -> None:
        """Waits until one of these units can be claimed."""
        started = time.perf_counter()
        first = places[0]
        who, label = self._requests[first].holder, self._units[first].wanted.label
        self._observer.waiting(f"{who} compiles {label}")
        while not any(self._take(place) for place in places):
            time.sleep(POLL_SECONDS)
        self.waited += time.perf_counter() - started

    def _take(self, place: int) -> bool:
        if place not in self._leases and (lease := self._requests[place].attempt()) is not None:
            self._leases[place] = lease
        return place in self._leases

    def _claim(self, place: int) -> bool:
        """Whether the unit is to be compiled now: no other process does, or has stored it."""
        if self._take(place):
            wanted = self._units[place].wanted
            if (found := stored(wanted, self._reader, self._policy)) is None:
                return True
            self._begin(place)
            self._finish(place, found)
        self._ours.remove(place)
        return False

    def _here(self, places: Iterable[int]) -> Steps:
        for place in places:
            if self._claim(place):
                self._begin(place)
                self._compile_here(place)
                yield

    def _in_workers(self, places: list[int], pool: WorkerPool) -> Steps:
        orders, left = self._orders(places, pool.jobs)
        failures: dict[int, VllmcError] = {}

        def claim(index: int) -> bool:
            return self._claim(orders[index][0])

        with closing(pool.run([order for _, order in orders], claim)) as events:
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
        yield from self._here(sorted(left))

    def _orders(
        self, places: list[int], jobs: int
    ) -> tuple[list[tuple[int, Order]], dict[int, str]]:
        """What workers are to do, by the unit's place, and why they cannot do the rest."""
        from vllmc.core.graph.travel import pack_piece

        spec = self._job.spec
        cxx = cxx_candidates(vllmc_overrides(spec))
        at_once = min(jobs, len(places))
        found, left = [], dict[int, str]()
        for place in places:
            unit = self._units[place].wanted.unit
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
        while self._ours and self._ours[0] in self._done:
            self._keep(self._ours[0])

    def _keep(self, place: int) -> None:
        done = self._done.pop(place)
        self._ours.remove(place)
        wanted = self._units[place].wanted
        self._finish(place, keep(wanted, done.compiled, done.seconds, self._reader, self._policy))

    def _finish(self, place: int, result: UnitResult) -> None:
        self._leases.pop(place).release()
        label = self._units[place].wanted.label
        self._observer.unit_finished(label, result.outcome, result.seconds)
        self._results[place] = result


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
