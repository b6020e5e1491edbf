"""The pipeline: resolve, capture, split, plan, key, obtain, link. The only composer.

Cold and warm differ in one thing: whether `obtain` finds a unit in the store or has it compiled,
and whether a stored record spares everything before that. What is linked is the same either way:
a layout, and artifacts as bytes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from vllmc.core.cache.factors import check_in_force
from vllmc.core.cache.record import ProgramRecord, ProgramUnit
from vllmc.core.cache.sources import collect
from vllmc.core.cache.store import Store
from vllmc.core.cache.usage import Counts, Hold
from vllmc.core.compilation import Compilation, Numbered
from vllmc.core.errors import UnsafeCacheError, UsageError, VllmcError
from vllmc.core.events import Observer, UnitOutcome
from vllmc.core.graph.layout import Layout
from vllmc.core.graph.passes.report import PassReport, totals
from vllmc.core.job import Job
from vllmc.core.layer_names import LayerNameCost, cost_of
from vllmc.core.models.built import build_model
from vllmc.core.models.model import Weights
from vllmc.core.obtain import Policy, Reader, UnitResult, Wanted, find, label_of
from vllmc.core.prediction import ANY_RANGE, Found, Meanwhile, Miss, explain_miss, is_current
from vllmc.core.runtime.conditions import spoken
from vllmc.core.runtime.cuda_graphs import DEFAULT_SIZES, CudaGraphs, Recorder
from vllmc.core.runtime.loader import load_artifact
from vllmc.core.runtime.program import Guards, Program, Variant, link
from vllmc.core.spec import CompileRange, CompileSpec
from vllmc.core.torch_compat.minors import IS_NEWER
from vllmc.core.torch_compat.version import NEWEST, spelled
from vllmc.core.workers.pool import WorkerPool

if TYPE_CHECKING:
    from vllmc.core.cache.remote import Remote
    from vllmc.core.graph.capture import Capture
    from vllmc.core.graph.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Wall time of the stages."""

    total: float
    capture: float = 0.0
    compile: float = 0.0
    store: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A program that is in the store, with the bytes of its artifacts, verified.

    `program` says whether its record was there before; `miss` why not. `layer_names` is what the
    strings in custom ops cost: None where they cost nothing, and where nothing was captured.
    `passes` is what each did to what was captured and compiled now. While `hold` lives no
    `cache prune` removes the program: None where it was not stored, and in a cache that cannot
    be written.
    """

    program: Literal["hit", "miss"]
    record: ProgramRecord
    units: tuple[UnitResult, ...]
    miss: Miss | None
    layer_names: LayerNameCost | None
    passes: tuple[PassReport, ...]
    seconds: Seconds
    hold: Hold | None

    @property
    def outcome(self) -> Literal["hit", "compiled", "partial"]:
        """`hit` when nothing was compiled, `compiled` when nothing was found, else `partial`."""
        outcomes = {unit.outcome for unit in self.units}
        if outcomes <= {"hit"}:
            return "hit"
        return "partial" if "hit" in outcomes else "compiled"

    def count(self, outcome: UnitOutcome) -> int:
        """How many units came out that way."""
        return sum(unit.outcome == outcome for unit in self.units)


def obtain_program(
    job: Job,
    store: Store,
    observer: Observer,
    *,
    policy: Policy | None = None,
    weights: Weights = "fake",
    pool: WorkerPool | None = None,
    meanwhile: Meanwhile | None = None,
    remote: Remote | None = None,
) -> Ready:
    """Finds the program in the store, or captures the model and obtains each of its units.

    What is missing is compiled in this process, or by the workers of `pool`. `meanwhile` is called
    with the record of a program that is there, while its artifacts are read. One process compiles
    a program, or a unit that programs share; others that want the same wait and then find it. What
    the store lacks is looked for at `remote` first, which fails nothing that can be compiled.
    Raises what capture, compilers and `meanwhile` raise, and `VllmcError` (`config-changed`) where
    this thread would compile under other options than the job's key was made of. Where `policy`
    forbids compiling, raises `CheckFailed` for what is missing and `UnsafeCacheError` for what is
    corrupt.
    """
    policy = policy or Policy()
    started = time.perf_counter()
    reader = Reader(store, observer, repairs=policy.may_compile)
    if not policy.force and (found := reader.program(job, meanwhile)) is not None:
        return _hit(job, store, found, started)
    # A cache may be read-only where nothing is to be compiled.
    if policy.may_compile:
        store.check_writable()
    lock = (
        store.lock(job.key, lambda who: observer.waiting(f"{who} compiles this model"))
        if policy.may_compile
        else nullcontext()
    )
    with lock:
        if not policy.force and (found := reader.program(job)) is not None:
            return _hit(job, store, found, started)
        if remote is not None and not policy.force:
            _pull(remote, job, store, observer, policy)
            if (found := reader.program(job)) is not None:
                return _hit(job, store, found, started)
        return _build(job, reader, observer, policy, weights, pool, started)


def open_program(
    ready: Ready,
    entry: torch.nn.Module,
    guards: Guards | None = None,
    *,
    recorder: Recorder | None = None,
    graph_sizes: Sequence[int] = DEFAULT_SIZES,
) -> Program:
    """Loads the artifacts, each once, and links them with the tensors of `entry`.

    `guards` looks at each call, as a `GuardCheck` does. With `recorder` (`recorder_for(device)`)
    decode steps of `graph_sizes` tokens replay CUDA graphs: see `vllmc.core.runtime.cuda_graphs`.
    """
    layout = Layout.from_json(ready.record.program)
    artifacts = {unit.artifact: unit.data for unit in ready.units}
    loaded = {digest: load_artifact(data) for digest, data in artifacts.items()}
    by_place = {(unit.pieces[0], unit.range): loaded[unit.artifact] for unit in ready.units}
    variants = [
        Variant(
            range=CompileRange.parse(name),
            pieces=tuple(
                by_place.get((piece, name)) or by_place[piece, ANY_RANGE] for piece in layout.pieces
            ),
        )
        for name in layout.ranges
    ]
    graphs = None if recorder is None else CudaGraphs(layout, recorder, graph_sizes)
    program = link(layout, entry, variants, guards, graphs)
    program.hold = ready.hold
    return program


def capture_model(job: Job, weights: Weights = "fake") -> Capture:
    """Builds and captures the job's model, and runs the passes over the graph that work there.

    Runs under the configuration in force. Raises what `build_model` and `capture` raise.
    """
    # What only a miss needs is imported on a miss: Dynamo, Inductor and sympy take a second.
    from vllmc.core.graph.capture import capture
    from vllmc.core.graph.passes.manager import passes_at, run_passes

    captured = capture(job.model, build_model(job.model, job.spec, weights), job.spec)
    passes = run_passes(captured.graph, passes_at("captured", job.spec.chosen_passes))
    return replace(captured, passes=passes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Obtained:
    """The units of a plan, in its order, and the seconds of wall time in which they compiled."""

    units: tuple[UnitResult, ...]
    compiling: float


def obtain_units(
    plan: Plan,
    job: Job,
    reader: Reader,
    observer: Observer,
    policy: Policy,
    pool: WorkerPool | None = None,
) -> Obtained:
    """Obtains each unit of `plan`, under the configuration in force.

    Raises what `find` and `Compilation.run` do.
    """
    from vllmc.core.graph.plan import plan_units

    units = plan_units(plan, job.spec)
    results: dict[int, UnitResult] = {}
    missing = []
    for index, (names, unit) in enumerate(units):
        found = find(unit, names, job, reader, policy)
        if isinstance(found, Wanted):
            missing.append(Numbered(wanted=found, index=index, total=len(units)))
            continue
        label = label_of(unit, names)
        observer.unit_started(label, index, len(units))
        observer.unit_finished(label, found.outcome, found.seconds)
        results[index] = found
    compilation = Compilation(missing, job, reader, observer, policy)
    for numbered, result in zip(missing, compilation.run(pool), strict=True):
        results[numbered.index] = result
    return Obtained(
        units=tuple(results[index] for index in range(len(units))), compiling=compilation.waited
    )


def _build(
    job: Job,
    reader: Reader,
    observer: Observer,
    policy: Policy,
    weights: Weights,
    pool: WorkerPool | None,
    started: float,
) -> Ready:
    begun = time.perf_counter()
    check_in_force(job.factors, job.spec)
    if IS_NEWER and policy.may_compile:
        _check_newer_torch(reader.store, observer)
    if not (policy.may_compile and _compiles_on_its_own(job.spec)):
        pool = None
    if pool is not None:
        # While this process captures, the other gets ready.
        pool.prepare(job.spec)

    from vllmc.core.graph.names import find_named_pieces
    from vllmc.core.graph.plan import make_plan
    from vllmc.core.torch_compat.config import applied, vllmc_overrides

    miss = None if policy.force else explain_miss(job, reader.store)
    with applied(vllmc_overrides(job.spec)):
        observer.stage("capture")
        captured = capture_model(job, weights)
        plan = make_plan(captured, job.spec)
        captured_at = time.perf_counter()
        _warn_of_promises(plan.layout, observer)
        obtained = obtain_units(plan, job, reader, observer, policy, pool)
    results = obtained.units
    named = find_named_pieces(plan.unique)
    record = ProgramRecord(
        key=job.key,
        model=job.label,
        created=time.time(),
        factors=job.factors,
        sources=collect(captured.functions, since=job.since),
        guarded=job.read_guarded(captured.guarded),
        units=tuple(
            ProgramUnit(key=r.key, artifact=r.artifact, range=r.range, pieces=r.pieces)
            for r in results
        ),
        pieces=plan.counts,
        program=plan.layout.to_json(),
    )
    hold = _publish(record, results, reader.store) if policy.may_compile else None
    finished = time.perf_counter()
    return Ready(
        program="miss",
        record=record,
        units=results,
        miss=miss,
        layer_names=None if named is None else cost_of(named, results),
        passes=totals(
            [("the captured graph", captured.passes), *((u.pieces[0], u.passes) for u in results)]
        ),
        seconds=Seconds(
            total=finished - started,
            capture=captured_at - begun,
            compile=obtained.compiling,
            store=finished - captured_at - obtained.compiling,
        ),
        hold=hold,
    )


def _check_newer_torch(store: Store, observer: Observer) -> None:
    observer.warning(
        "torch-newer",
        f"torch {torch.__version__} is newer than vllmc knows, and used as {spelled(NEWEST)} is",
        "what vllmc was tested with is in docs/torch-versions.md",
    )
    from vllmc.core.torch_compat.self_check import check_newer

    check_newer(store.root)


def _publish(record: ProgramRecord, results: Sequence[UnitResult], store: Store) -> Hold | None:
    outcomes = Counter(unit.outcome for unit in results)
    counts = Counts(
        hits=outcomes["hit"],
        misses=outcomes["compiled"] + outcomes["dup"],
        dups=outcomes["dup"],
        seconds_saved=store.compile_seconds(u.key for u in results if u.outcome == "hit"),
    )
    # Held before it is there, so that no prune comes in between.
    hold = store.note_use(record.key, counts)
    for unit in results:
        # A prune may have removed what nothing referred to yet.
        store.retain(unit.artifact, unit.data)
    store.put_program(record)
    return hold


def _pull(remote: Remote, job: Job, store: Store, observer: Observer, policy: Policy) -> None:
    """Fetches the job's program, if the remote holds it; warns once of what keeps it from that.

    Raises `UsageError` (`bad-remote`), and what is unsafe where nothing can be compiled.
    """
    from vllmc.core.cache.remote import RemoteFailed
    from vllmc.core.cache.transfer import pull

    if remote.given_up.is_set():
        return
    try:
        done = pull(remote, store, [job.key], observer, lambda record: is_current(record, job))
        error: VllmcError | None = next(iter(done.refused), None)
    except UsageError:
        raise
    except VllmcError as raised:
        error = raised
    if error is None:
        if not done.programs:
            observer.remark(f"{remote.name} holds {job.label} as other source files make it")
        return
    if error.code == "unknown-key":
        observer.remark(error.message)
        return
    if isinstance(error, UnsafeCacheError) and not policy.may_compile:
        raise error
    if isinstance(error, RemoteFailed) and error.slow:
        # Other programs of this command need not wait for it too.
        remote.given_up.set()
    observer.warning(error.code, error.message, f"it goes on without; {error.hint}")


def _compiles_on_its_own(spec: CompileSpec) -> bool:
    """Whether a worker is worth its start: eager compiles nothing, Triton has its own workers."""
    return spec.backend == "inductor" and spec.device == "cpu"


def _warn_of_promises(layout: Layout, observer: Observer) -> None:
    if layout.promises:
        conditions = " and ".join(spoken(text, layout.sizes) for text in layout.promises)
        observer.warning(
            "guards-dropped",
            f"the captured graph is right only where {conditions}: the program does not check it",
            "vllmc run --guards check does; --dynamic-shapes unbacked assumes nothing",
        )


def _hit(job: Job, store: Store, found: Found, started: float) -> Ready:
    keys = {unit.key for unit in found.record.units}
    counts = Counts(hits=len(keys), seconds_saved=store.compile_seconds(keys))
    return Ready(
        program="hit",
        record=found.record,
        units=tuple(
            UnitResult(
                pieces=unit.pieces,
                range=unit.range,
                outcome="hit",
                key=unit.key,
                artifact=unit.artifact,
                data=found.artifacts[unit.artifact],
                seconds=0.0,
            )
            for unit in found.record.units
        ),
        miss=None,
        layer_names=None,
        passes=(),
        seconds=Seconds(total=time.perf_counter() - started),
        hold=store.note_use(job.key, counts),
    )
