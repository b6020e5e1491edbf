"""Many processes that publish, read, verify, repair and prune one cache, some of them killed.

Each process publishes programs out of a fixed set, whose units they share, as `warm` does: under
the program's lease and each unit's. What it reads back must be what belongs there, byte by byte.
Any of them may be killed by SIGKILL at any moment, and is replaced by another.
"""

from __future__ import annotations

import dataclasses
import os
import random
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from pathlib import Path

from vllmc.core.cache.key import Factor, key_of, sha256_hex
from vllmc.core.cache.prune import execute, plan_prune
from vllmc.core.cache.record import ProgramRecord, ProgramUnit, UnitRecord
from vllmc.core.cache.retention import Criteria
from vllmc.core.cache.store import MissingArtifact, Store
from vllmc.core.cache.usage import Counts, Hold
from vllmc.core.errors import VllmcError

PROGRAMS = 40
UNITS = 60
UNITS_OF_A_PROGRAM = 5
PATIENCE_SECONDS = 60


def artifact(index: int) -> bytes:
    """The artifact of a unit: from a few bytes to 200 KB."""
    return random.Random(index).randbytes(1 + index * index * 57)


def unit(index: int) -> UnitRecord:
    """The record of a unit."""
    data = artifact(index)
    factors = (Factor(group="graph", name="digest", value=index, origin="probe"),)
    return UnitRecord(
        key=key_of(factors),
        artifact=sha256_hex(data),
        format="soak",
        code=sha256_hex(b"code of " + data),
        bytes=len(data),
        seconds=1.0,
        created=1000.0,
        factors=factors,
    )


def program(index: int) -> tuple[ProgramRecord, tuple[int, ...]]:
    """The record of a program, and its units."""
    places = tuple(random.Random(1000 + index).sample(range(UNITS), UNITS_OF_A_PROGRAM))
    factors = (Factor(group="model", name="config", value=index, origin="probe"),)
    units = tuple(unit(place) for place in places)
    record = ProgramRecord(
        key=key_of(factors),
        model=f"model-{index}",
        created=1000.0,
        factors=factors,
        sources=(),
        guarded={},
        units=tuple(
            ProgramUnit(key=u.key, artifact=u.artifact, range="1:8192", pieces=(f"piece_{n}",))
            for n, u in enumerate(units)
        ),
        pieces={"total": 9, "splitting": 4, "compilable": 5, "unique": len(units)},
        program={"soak": index},
    )
    return record, places


class Soaker:
    """One process: does what it is told to, and says in a word what came of it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waits = 0
        self._hold: Hold | None = None

    def warm(self, index: int) -> str:
        """Publishes a program that is not there: `hit`, `compiled`."""
        record, places = program(index)
        if self._store.programs(record.key):
            return self.read(index)
        with self._store.lock(record.key, self._on_wait, PATIENCE_SECONDS):
            if self._store.programs(record.key):
                return "hit after a wait"
            for place in places:
                wanted = unit(place)
                with self._store.lock(wanted.key, self._on_wait, PATIENCE_SECONDS):
                    if self._store.unit(wanted.key) is None:
                        time.sleep(0.002)  # compiles
                        self._store.put_artifact(artifact(place))
                        self._store.put_unit(wanted)
            # As the pipeline does.
            self._hold = self._store.note_use(record.key, Counts(misses=len(places)))
            for place in places:
                self._store.retain(unit(place).artifact, artifact(place))
            self._store.put_program(record)
        return "compiled"

    def read(self, index: int) -> str:
        """Reads a program with all that belongs to it: `hit`, `miss`, `WRONG`."""
        record, places = program(index)
        found = self._store.programs(record.key)
        if not found:
            return "miss"
        if found != (record,):
            return "WRONG program"
        for place in places:
            wanted = unit(place)
            if self._store.unit(wanted.key) not in (None, wanted):
                return "WRONG unit"
            try:
                data = self._store.read_artifact(wanted.artifact)
            except MissingArtifact:
                return "miss, pruned meanwhile"
            if data != artifact(place):
                return "WRONG artifact"
        return "hit"

    def verify(self, _: int) -> str:
        """`sound`, or `UNSOUND` and why: nobody damages anything."""
        problems = [p for p in self._store.verify() if p.unsafe]
        self._store.plan_repair(problems).execute()
        return f"UNSOUND {problems}" if problems else "sound"

    def prune(self, index: int) -> str:
        """Leaves no more than `index` programs, but for those that are held: `pruned`."""
        done = execute(plan_prune(self._store, Criteria(max_count=index)))
        return "pruned" if done.removed else "nothing to prune"

    def _on_wait(self, who: str) -> None:
        self._waits += 1

    def run(self, tell: int, seed: int) -> None:
        """Does one thing after the other, for ever."""
        choice = random.Random(seed)
        things = {
            "warm": self.warm,
            "read": self.read,
            "verify": self.verify,
            "prune": self.prune,
        }
        while True:
            [name] = choice.choices(list(things), weights=[12, 24, 2, 1])
            self._waits = 0
            try:
                came = things[name](choice.randrange(PROGRAMS))
            except VllmcError as error:
                came = f"ERROR {error.code} {error.message}"
            if isinstance(came, str) and self._waits:
                os.write(tell, f"{name}: waited\n".encode())
            os.write(tell, f"{name}: {came}\n".encode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soaked:
    """How often each thing came out each way, and the problems that the cache has at the end."""

    counts: Counter[str]
    problems: tuple[str, ...]

    def bad(self) -> dict[str, int]:
        """What must not come out at all."""
        signs = ("WRONG", "UNSOUND", "ERROR", "ended")
        return {what: n for what, n in self.counts.items() if any(s in what for s in signs)}


def soak(root: Path, processes: int, seconds: float, *, seed: int = 0) -> Soaked:
    """Soaks the cache at `root`, which is emptied now and then so that there is work."""
    store = Store(root)
    choice = random.Random(seed)
    counts: Counter[str] = Counter()
    said, tell = os.pipe()
    pids: list[int] = []
    rest = b""
    end = time.monotonic() + seconds
    due = dict.fromkeys(("kill", "wipe"), time.monotonic() + 0.5)
    try:
        while time.monotonic() < end:
            while len(pids) < processes:
                seed += 1
                pids.append(_start(store, tell, seed))
            if select.select([said], [], [], 0.1)[0]:
                *lines, rest = (rest + os.read(said, 65536)).split(b"\n")
                counts.update(line.decode() for line in lines)
            if time.monotonic() > due["kill"]:
                counts["killed"] += 1
                _kill(pids.pop(choice.randrange(len(pids))))
                due["kill"] = time.monotonic() + choice.uniform(0.1, 0.5)
            if time.monotonic() > due["wipe"]:
                counts["records removed"] += _wipe(store, choice)
                due["wipe"] = time.monotonic() + 0.3
            for pid in list(pids):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    counts["a process ended by itself"] += 1
                    pids.remove(pid)
    finally:
        for pid in pids:
            _kill(pid)
        os.close(tell)
        os.close(said)
    problems = tuple(f"{p.kind} {p.path}: {p.detail}" for p in store.verify() if p.unsafe)
    return Soaked(counts=counts, problems=problems)


def _start(store: Store, tell: int, seed: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            Soaker(store).run(tell, seed)
        finally:
            traceback.print_exc()
            os._exit(1)
    return pid


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _wipe(store: Store, choice: random.Random) -> int:
    """Removes some records, programs before units, as pruning does; artifacts stay."""
    removed = 0
    for index in choice.sample(range(PROGRAMS), PROGRAMS // 4):
        record, places = program(index)
        shutil.rmtree(store.layout.programs(record.key), ignore_errors=True)
        removed += 1
        for place in places[:2]:
            store.layout.unit(unit(place).key).unlink(missing_ok=True)
            removed += 1
    return removed
