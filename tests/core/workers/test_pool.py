from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch._inductor.config
from tiny_models import save_llama

from vllmc.core.cache.store import Store
from vllmc.core.errors import VllmcError
from vllmc.core.events import SilentObserver
from vllmc.core.job import Job, make_job
from vllmc.core.models.resolve import resolve
from vllmc.core.obtain import Policy
from vllmc.core.pipeline import Ready, obtain_program
from vllmc.core.spec import CompileRange, CompileSpec
from vllmc.core.workers.pool import WorkerPool

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {
    "inductor": (("cpp.simdlen", 0), ("epilogue_fusion", False)),
    "functorch": (("cse", False),),
}


class Notes(SilentObserver):
    """An observer that writes down what it is told; `started` is called with each unit's label."""

    def __init__(self, started: Callable[[str], None] = lambda label: None) -> None:
        self.begun: list[str] = []
        self.outcomes: list[tuple[str, str]] = []
        self.warnings: list[tuple[str, str]] = []
        self.remarks: list[str] = []
        self._started = started

    def unit_started(self, name: str, index: int, total: int) -> None:
        self.begun.append(name)
        self._started(name)

    def unit_finished(self, name: str, outcome: str, seconds: float) -> None:
        self.outcomes.append((name, outcome))

    def warning(self, code: str, message: str, hint: str = "") -> None:
        self.warnings.append((code, message))

    def remark(self, text: str) -> None:
        self.remarks.append(text)


def processes() -> dict[int, tuple[int, str]]:
    """The parent of each process, and its state."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            found[int(entry.name)] = (int(fields[1]), fields[0])
    return found


def children_of(parent: int) -> list[int]:
    return [pid for pid, (of, state) in processes().items() if of == parent and state != "Z"]


def servers() -> list[int]:
    return [
        pid
        for pid in children_of(os.getpid())
        if b"vllmc.core.workers.server" in (Path("/proc") / str(pid) / "cmdline").read_bytes()
    ]


def workers() -> list[int]:
    return [worker for server in servers() for worker in children_of(server)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """A job of three units, and as many for each further range."""
    directory = save_llama(tmp_path_factory.mktemp("models") / "llama", layers=2)
    facts = tmp_path_factory.getbasetemp() / "facts"

    def make(**changes: Any) -> Job:
        spec = CompileSpec(**({"ranges": (CompileRange(1, 64),)} | changes))
        return make_job(
            resolve(str(directory), layers=None),
            spec,
            environment={},
            cache_dir=facts,
            origins={},
        )

    return make


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as made:
        yield made
    assert servers() == []


def artifacts(ready: Ready) -> list[tuple[str, str, str, str]]:
    return [(u.pieces[0], u.range, u.outcome, u.artifact) for u in ready.units]


@pytest.fixture(scope="module")
def here_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of `here`."""
    return Store(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def here(job: Any, here_store: Store) -> Ready:
    """What compiling in this process gives."""
    return obtain_program(job(), here_store, SilentObserver())


def test_workers_compile_what_this_process_compiles(
    job: Any, here: Ready, pool: WorkerPool, tmp_path: Path
) -> None:
    notes = Notes()
    ready = obtain_program(job(), Store(tmp_path), notes, pool=pool)
    assert artifacts(ready) == artifacts(here)
    assert {unit.outcome for unit in ready.units} == {"compiled"}
    assert [name for name, _ in notes.outcomes] == [
        f"{unit.pieces[0]} for 1:64 tokens" for unit in ready.units
    ]
    assert (notes.warnings, notes.remarks) == ([], [])
    again = obtain_program(job(), Store(tmp_path), Notes(), pool=pool)
    assert again.outcome == "hit"


@pytest.mark.parametrize("held", [1, 3])
def test_workers_leave_out_what_another_process_compiles(
    job: Any, here: Ready, here_store: Store, pool: WorkerPool, tmp_path: Path, held: int
) -> None:
    store = Store(tmp_path)
    leases = [store.request(unit.key).attempt() for unit in here.units[:held]]
    notes = Notes()
    compiled: list[list[tuple[str, str]]] = []

    def waiting(what: str) -> None:
        compiled.append(list(notes.outcomes))
        for unit, lease in zip(here.units, leases, strict=False):
            assert lease is not None
            record = here_store.unit(unit.key)
            assert record is not None
            store.put_artifact(unit.data)
            store.put_unit(record)
            lease.release()

    notes.waiting = waiting  # type: ignore[method-assign]
    ready = obtain_program(job(), store, notes, pool=pool)
    assert [len(before) for before in compiled] == [3 - held]
    assert [unit.outcome for unit in ready.units] == ["hit"] * held + ["compiled"] * (3 - held)
    assert [unit.artifact for unit in ready.units] == [unit.artifact for unit in here.units]
    assert notes.begun[3 - held :] == [
        label for label, outcome in notes.outcomes if outcome == "hit"
    ]


def test_workers_compile_under_the_options_of_the_key(
    job: Any, here: Ready, pool: WorkerPool, tmp_path: Path
) -> None:
    other = job(**OPTIONS)
    notes = Notes()
    there = obtain_program(other, Store(tmp_path / "there"), notes, pool=pool)
    assert notes.remarks == []
    alone = obtain_program(other, Store(tmp_path / "alone"), SilentObserver())
    assert artifacts(there) == artifacts(alone)
    assert {u.artifact for u in there.units}.isdisjoint(u.artifact for u in here.units)


def test_a_worker_declines_what_it_would_compile_under_other_options(
    job: Any, here: Ready, pool: WorkerPool, tmp_path: Path
) -> None:
    notes = Notes()
    with torch._inductor.config.patch({"cpp.simdlen": 0}):
        patched = job()
        ready = obtain_program(patched, Store(tmp_path), notes, pool=pool)
    assert len(notes.remarks) == 3
    assert all("inductor.cpp.simdlen is another here" in text for text in notes.remarks)
    assert {u.artifact for u in ready.units}.isdisjoint(u.artifact for u in here.units)


def test_a_worker_that_is_killed_is_told_of_and_its_unit_compiled_once_more(
    job: Any, here: Ready, pool: WorkerPool, tmp_path: Path
) -> None:
    killed: list[str] = []

    def kill_first(label: str) -> None:
        if not killed:
            killed.append(label)
            os.kill(min(workers()), signal.SIGKILL)

    notes = Notes(kill_first)
    ready = obtain_program(job(), Store(tmp_path), notes, pool=pool)
    assert artifacts(ready) == artifacts(here)
    [(code, message)] = notes.warnings
    assert code == "worker-died"
    assert killed[0] in message
    assert "SIGKILL" in message
    # It comes again when the others are through.
    assert notes.begun.count(killed[0]) == 2
    assert notes.begun[-1] == killed[0]


@pytest.mark.thorough
def test_a_unit_whose_worker_is_killed_twice_is_an_error_and_the_others_are_kept(
    job: Any, pool: WorkerPool, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill(label: str) -> None:
        # The first to begin, and later the last: others may not have left yet.
        if label.startswith("piece_0 "):
            killed.append(max(workers()) if killed else min(workers()))
            os.kill(killed[-1], signal.SIGKILL)

    with pytest.raises(VllmcError) as caught:
        obtain_program(job(), Store(tmp_path), Notes(kill), pool=pool)
    assert (caught.value.code, caught.value.exit_code) == ("worker-died", 1)
    assert "piece_0 for 1:64 tokens" in caught.value.message
    assert "SIGKILL" in str(caught.value.context["cause"])
    ready = obtain_program(job(), Store(tmp_path), Notes())
    assert [unit.outcome for unit in ready.units] == ["compiled", "hit", "hit"]


@pytest.mark.thorough
def test_a_worker_over_its_limit_is_ended(job: Any, tmp_path: Path) -> None:
    with WorkerPool(2, memory=1 << 20) as pool, pytest.raises(VllmcError) as caught:
        obtain_program(job(), Store(tmp_path), Notes(), pool=pool)
    assert caught.value.code == "worker-died"
    assert caught.value.context["cause"] == "it took more than 1 MB of memory"
    assert servers() == []


@pytest.mark.thorough
def test_the_process_that_makes_workers_may_die_too(
    job: Any, here: Ready, pool: WorkerPool, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_server(label: str) -> None:
        if not killed:
            killed.extend(servers())
            os.kill(killed[0], signal.SIGKILL)

    notes = Notes(kill_server)
    ready = obtain_program(job(), Store(tmp_path), notes, pool=pool)
    assert artifacts(ready) == artifacts(here)
    assert {code for code, _ in notes.warnings} == {"worker-died"}


def test_an_interrupt_leaves_no_process_and_keeps_what_was_compiled(
    job: Any, tmp_path: Path
) -> None:
    left: list[int] = []

    class Interrupting(Notes):
        def unit_finished(self, name: str, outcome: str, seconds: float) -> None:
            super().unit_finished(name, outcome, seconds)
            left.extend([*servers(), *workers()])
            raise KeyboardInterrupt

    with WorkerPool(2) as pool, pytest.raises(KeyboardInterrupt):
        obtain_program(job(), Store(tmp_path), Interrupting(), pool=pool)
    assert left
    assert not {pid for pid, (_, state) in processes().items() if state != "Z"} & set(left)
    assert "hit" in {u.outcome for u in obtain_program(job(), Store(tmp_path), Notes()).units}


def test_an_error_of_the_compiler_is_the_same_from_a_worker(
    job: Any, pool: WorkerPool, tmp_path: Path
) -> None:
    broken = job(inductor=(("cpp.cxx", ["no-such-compiler"]),))
    told = []
    for used in (pool, None):
        with pytest.raises(VllmcError) as caught:
            obtain_program(broken, Store(tmp_path), Notes(), pool=used)
        told.append((type(caught.value), caught.value.code, caught.value.hint))
    assert told[0] == told[1]
    assert told[0][1] == "no-compiler"


@pytest.mark.thorough
def test_workers_are_forked_from_a_process_of_one_thread(
    job: Any, pool: WorkerPool, tmp_path: Path
) -> None:
    threads: list[int] = []

    def count(label: str) -> None:
        [server] = servers()
        threads.append(len(list((Path("/proc") / str(server) / "task").iterdir())))

    obtain_program(job(), Store(tmp_path), Notes(count), pool=pool)
    assert threads == [1, 1, 1]


def test_nothing_is_started_for_a_hit_or_where_nothing_is_compiled(
    job: Any, here: Ready, tmp_path: Path
) -> None:
    with WorkerPool(2) as pool:
        obtain_program(job(backend="eager"), Store(tmp_path), Notes(), pool=pool)
        assert servers() == []
        obtain_program(job(backend="eager"), Store(tmp_path), Notes(), pool=pool)
        assert servers() == []
        policy = Policy(may_compile=False)
        with pytest.raises(VllmcError, match="would-miss"):
            obtain_program(job(), Store(tmp_path), Notes(), policy=policy, pool=pool)
        assert servers() == []


def test_a_pool_that_was_prepared_for_nothing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with WorkerPool(2) as pool:
        pool.prepare(CompileSpec())
        while not list(tmp_path.glob("vllmc-workers-*")):
            time.sleep(0.01)
    assert list(tmp_path.glob("vllmc-workers-*")) == []
    assert servers() == []
