from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import serving
from tiny_models import save_llama

from vllmc.core.cache.key import canonical_json
from vllmc.core.cache.record import ProgramRecord
from vllmc.core.cache.remote import Remote
from vllmc.core.cache.store import Store
from vllmc.core.cache.trust import Trust
from vllmc.core.cache.usage import claimed
from vllmc.core.errors import CheckFailed, UnsafeCacheError, VllmcError
from vllmc.core.events import SilentObserver
from vllmc.core.job import Job, make_job
from vllmc.core.models.resolve import resolve
from vllmc.core.obtain import Policy, UnitResult
from vllmc.core.pipeline import Ready, obtain_program, open_program
from vllmc.core.runtime.sampler import SamplingParams
from vllmc.core.runtime.workload import Limits, WorkloadResult, run_workload
from vllmc.core.spec import CompileRange, CompileSpec
from vllmc.core.torch_compat.config import Group, Overrides, snapshot
from vllmc.core.torch_compat.minors import TORCH

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [4]]
SILU = ("torch.nn.functional.silu",)
INDUCTOR: dict[str, Any] = {"backend": "inductor"}


class Notes(SilentObserver):
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.units: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self.waits: list[str] = []
        self.remarks: list[str] = []

    def remark(self, text: str) -> None:
        self.remarks.append(text)

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def unit_finished(self, name: str, outcome: str, seconds: float) -> None:
        self.units.append((name, outcome))

    def warning(self, code: str, message: str, hint: str = "") -> None:
        self.warnings.append(code)

    def waiting(self, what: str) -> None:
        self.waits.append(what)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama", layers=2)


@pytest.fixture(scope="session")
def job(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """A job for the range 1:64 with the eager backend; with changes, and `layers`."""
    facts = tmp_path_factory.getbasetemp() / "facts"

    def make(*, layers: int | None = None, **changes: Any) -> Job:
        fields: dict[str, Any] = {"ranges": (CompileRange(1, 64),), "backend": "eager"}
        return make_job(
            resolve(str(model_directory), layers=layers),
            CompileSpec(**(fields | changes)),
            environment={},
            cache_dir=facts,
            origins={},
        )

    return make


def warm(job: Job, root: Path, observer: Notes | None = None, **policy: bool) -> Ready:
    return obtain_program(job, Store(root), observer or Notes(), policy=Policy(**policy))


def generate(job: Job, ready: Ready) -> WorkloadResult:
    entry = job.model.build("real", job.spec)
    return run_workload(
        open_program(ready, entry),
        PROMPTS,
        SamplingParams(max_new_tokens=6, temperature=0.0, logprobs=2, ignore_eos=True),
        Limits(vocab_size=128, max_position=128, dtype=torch.float32, device="cpu"),
        batch_sizes=(1, 2, 3),
    )


def outputs(result: WorkloadResult) -> list[Any]:
    """Token ids and log-probabilities, to the last bit."""
    return json.loads(json.dumps([dataclasses.asdict(o) for o in result.outputs]))


def token_ids(result: WorkloadResult) -> list[tuple[int, ...]]:
    return [output.token_ids for output in result.outputs]


def counts(ready: Ready) -> dict[str, int]:
    return {name: ready.count(name) for name in ("hit", "dup", "compiled")}  # type: ignore[arg-type]


def blob(root: Path, digest: str) -> Path:
    return Store(root).layout.blob(digest)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.chmod(0o600)
    path.write_bytes(data)


@pytest.fixture(scope="session")
def expected(job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The token ids of the model, by the eager backend."""
    plain = job()
    return token_ids(generate(plain, warm(plain, tmp_path_factory.mktemp("eager"))))


@pytest.fixture(scope="session")
def compiled(job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache that Inductor filled, the first result of it, and what the program generated."""
    root = tmp_path_factory.mktemp("inductor")
    ready = warm(job(**INDUCTOR), root)
    return root, ready, generate(job(**INDUCTOR), ready)


def test_a_program_is_compiled_once_and_then_found(job: Any, tmp_path: Path) -> None:
    notes = Notes()
    first = warm(job(), tmp_path, notes)
    assert (first.program, first.outcome) == ("miss", "compiled")
    assert counts(first) == {"hit": 0, "dup": 0, "compiled": 3}
    assert notes.stages[0] == "capture"
    assert [outcome for _, outcome in notes.units] == ["compiled"] * 3
    again = Notes()
    second = warm(job(), tmp_path, again)
    assert (second.program, second.outcome) == ("hit", "hit")
    assert again.stages == again.units == []
    assert [u.artifact for u in second.units] == [u.artifact for u in first.units]
    assert second.record == first.record


def test_the_same_model_with_more_layers_reuses_its_units(job: Any, tmp_path: Path) -> None:
    warm(job(), tmp_path)
    deeper = warm(job(layers=5), tmp_path)
    assert (deeper.program, deeper.outcome) == ("miss", "hit")
    assert counts(deeper) == {"hit": 3, "dup": 0, "compiled": 0}
    assert deeper.record.pieces == {"total": 11, "splitting": 5, "compilable": 6, "unique": 3}
    assert deeper.miss is not None
    assert [change.name for change in deeper.miss.changes] == ["num_hidden_layers"]


def test_another_range_is_partly_found(job: Any, tmp_path: Path) -> None:
    warm(job(), tmp_path)
    more = warm(job(sizes=(4,)), tmp_path)
    assert more.outcome == "partial"
    # The eager backend writes the same for every range.
    assert {(u.range, u.outcome) for u in more.units} == {("4", "dup"), ("1:64", "hit")}


@pytest.mark.skipif(not TORCH.local_overrides, reason="this torch has one set for all threads")
def test_a_key_made_under_other_options_compiles_nothing(job: Any, tmp_path: Path) -> None:
    """Overrides of torch's config are local to a thread: its key would name other code."""
    from torch._inductor import config

    with config.patch(max_autotune=True):
        tuned = job()
    errors: list[VllmcError] = []

    def work() -> None:
        try:
            warm(tuned, tmp_path)
        except VllmcError as error:
            errors.append(error)

    worker = threading.Thread(target=work)
    with config.patch(max_autotune=True):
        worker.start()
        worker.join()
    [error] = errors
    assert error.code == "config-changed"
    assert error.context["options"] == ["inductor.max_autotune"]
    assert Store(tmp_path).entries() == ()
    with config.patch(max_autotune=True):
        assert warm(tuned, tmp_path).outcome == "compiled"


class Witness(Notes):
    """Takes down the options in force, by (group, name), wherever the pipeline reports."""

    def __init__(self) -> None:
        super().__init__()
        self.in_force: list[dict[tuple[str, str], str]] = []

    def stage(self, name: str) -> None:
        self._look()

    def unit_started(self, name: str, index: int, total: int) -> None:
        self._look()

    def _look(self) -> None:
        nothing = Overrides(inductor=(), functorch=(), chosen=frozenset())
        groups: tuple[Group, ...] = ("inductor", "functorch", "dynamo")
        self.in_force.append(
            {(g, e.name): canonical_json(e.value) for g in groups for e in snapshot(g, nothing)}
        )


def test_capture_and_every_unit_happen_under_the_options_that_the_key_names(
    job: Any, tmp_path: Path
) -> None:
    tuned = job(inductor=(("max_autotune", True), ("cpp.threads", 3)), functorch=(("cse", False),))
    witness = Witness()
    ready = warm(tuned, tmp_path, witness)
    assert len(witness.in_force) == 1 + len(ready.units), "the capture, and each unit"
    named = {
        f.identity: canonical_json(f.value)
        for f in ready.record.factors
        if f.group in ("inductor", "functorch", "dynamo")
    }
    assert witness.in_force == [named] * len(witness.in_force)
    for unit in ready.units:
        stored = Store(tmp_path).unit(unit.key)
        assert stored is not None
        values = {f.identity: canonical_json(f.value) for f in stored.factors}
        assert {i: v for i, v in named.items() if i[0] != "dynamo"}.items() <= values.items()


def test_a_switch_of_torch_between_key_and_compilation_is_noticed(job: Any, tmp_path: Path) -> None:
    plain = job()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if before != "medium" else "high")
    try:
        with pytest.raises(VllmcError) as caught:
            warm(plain, tmp_path)
    finally:
        torch.set_float32_matmul_precision(before)
    assert caught.value.code == "config-changed"


def test_force_compiles_what_is_stored(job: Any, tmp_path: Path) -> None:
    first = warm(job(), tmp_path)
    forced = warm(job(), tmp_path, force=True)
    assert (forced.program, forced.outcome) == ("miss", "compiled")
    assert [u.artifact for u in forced.units] == [u.artifact for u in first.units]
    assert warm(job(), tmp_path).program == "hit"


def test_what_may_not_be_compiled_is_refused_and_nothing_is_written(
    job: Any, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    with pytest.raises(CheckFailed) as caught:
        warm(job(), root, may_compile=False)
    assert caught.value.code == "would-miss"
    assert not root.exists()


def test_units_are_found_without_writing_where_nothing_may_be_compiled(
    job: Any, tmp_path: Path
) -> None:
    warm(job(), tmp_path)
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    ready = warm(job(layers=3), tmp_path, may_compile=False)
    assert (ready.program, ready.outcome) == ("miss", "hit")
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before


def test_a_damaged_artifact_is_compiled_again_with_a_warning(job: Any, tmp_path: Path) -> None:
    first = warm(job(), tmp_path)
    damage(blob(tmp_path, first.units[1].artifact))
    notes = Notes()
    second = warm(job(), tmp_path, notes)
    assert notes.warnings == ["corrupt-artifact"]
    assert counts(second) == {"hit": 2, "dup": 0, "compiled": 1}
    assert [u.artifact for u in second.units] == [u.artifact for u in first.units]
    assert warm(job(), tmp_path).program == "hit"


@pytest.mark.parametrize("section", ["programs", "units"])
def test_a_damaged_record_is_written_again(job: Any, tmp_path: Path, section: str) -> None:
    warm(job(), tmp_path)
    files = [f.path for f in Store(tmp_path).layout.walk(section)]
    for path in files:
        damage(path)
    notes = Notes()
    if section == "units":
        # A whole program does not read them.
        assert warm(job(), tmp_path).program == "hit"
    deeper = warm(job() if section == "programs" else job(layers=4), tmp_path, notes)
    assert len(notes.warnings) == len(files)
    assert set(notes.warnings) == {"corrupt-record"}
    assert deeper.outcome == ("hit" if section == "programs" else "compiled")
    assert Store(tmp_path).verify() == ()


def test_a_damaged_artifact_is_refused_where_nothing_may_be_compiled(
    job: Any, tmp_path: Path
) -> None:
    first = warm(job(), tmp_path)
    path = blob(tmp_path, first.units[0].artifact)
    damage(path)
    with pytest.raises(UnsafeCacheError):
        warm(job(), tmp_path, may_compile=False)
    assert path.exists()


class Watched(Store):
    """A store that tells when it begins to read an artifact, and reads none until it may."""

    began, may = threading.Event(), threading.Event()

    def read_artifact(self, digest: str) -> bytes:
        self.began.set()
        assert self.may.wait(60)
        return Store.read_artifact(self, digest)


def test_artifacts_are_read_while_something_else_is_done(job: Any, tmp_path: Path) -> None:
    first = warm(job(), tmp_path)
    store = Watched(tmp_path)
    seen = []

    def meanwhile(record: ProgramRecord) -> None:
        assert store.began.wait(60)
        store.may.set()
        seen.append(record)

    found = obtain_program(job(), store, Notes(), meanwhile=meanwhile)
    assert found.program == "hit"
    assert [u.data for u in found.units] == [u.data for u in first.units]
    assert seen == [first.record]


def test_nothing_else_is_done_where_the_program_is_not_there(job: Any, tmp_path: Path) -> None:
    seen: list[ProgramRecord] = []
    store = Store(tmp_path)
    assert obtain_program(job(), store, Notes(), meanwhile=seen.append).program == "miss"
    assert seen == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), VllmcError("bad-weights", "none fit")])
def test_what_goes_wrong_while_artifacts_are_read_is_raised(
    job: Any, tmp_path: Path, error: BaseException
) -> None:
    warm(job(), tmp_path)

    def meanwhile(_: ProgramRecord) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        obtain_program(job(), Store(tmp_path), Notes(), meanwhile=meanwhile)
    assert caught.value is error


def test_a_damaged_artifact_is_compiled_again_whatever_else_was_done(
    job: Any, tmp_path: Path
) -> None:
    first = warm(job(), tmp_path)
    damage(blob(tmp_path, first.units[1].artifact))
    seen: list[ProgramRecord] = []
    notes = Notes()
    second = obtain_program(job(), Store(tmp_path), notes, meanwhile=seen.append)
    assert notes.warnings == ["corrupt-artifact"]
    assert counts(second) == {"hit": 2, "dup": 0, "compiled": 1}
    assert seen == [first.record]


def test_one_of_two_that_want_the_same_program_waits_and_finds_it(job: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    wanted = job()
    notes = Notes()
    results: list[Ready] = []
    waits = threading.Event()
    notes.waiting = lambda what: waits.set()  # type: ignore[method-assign]
    with store.lock(wanted.key, pytest.fail):
        thread = threading.Thread(
            target=lambda: results.append(obtain_program(wanted, store, notes))
        )
        thread.start()
        assert waits.wait(60)
        # What the other process does meanwhile.
        elsewhere = Store(tmp_path / "elsewhere")
        obtain_program(wanted, elsewhere, Notes())
        ignore = shutil.ignore_patterns("locks")
        shutil.copytree(elsewhere.layout.top, store.layout.top, dirs_exist_ok=True, ignore=ignore)
    thread.join(60)
    (ready,) = results
    assert ready.program == "hit"


def test_what_a_remote_holds_of_other_sources_is_told_and_not_used(
    job: Any, tmp_path: Path
) -> None:
    there = Store(tmp_path / "remote")
    record = warm(job(), there.root).record
    there.layout.program(record.key, record.id).unlink()
    changed = dataclasses.replace(record.sources[0], digest="0" * 32)
    there.put_program(dataclasses.replace(record, sources=(changed, *record.sources[1:])))
    notes, remote = Notes(), Remote(url=str(there.root))
    store = Store(tmp_path / "cache", trust=Trust(unsigned=True))
    assert obtain_program(job(), store, notes, remote=remote).program == "miss"
    assert notes.warnings == []
    assert [text for text in notes.remarks if "other source files" in text]


def test_a_remote_that_hangs_is_waited_for_once(job: Any, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    notes = Notes()
    with serving(tmp_path) as served:
        served.delay = 5.0
        remote = Remote(url=served.url, patience=1.0)
        first, second = (
            obtain_program(wanted, Store(tmp_path / "cache"), notes, remote=remote)
            for wanted in (job(), job(layers=1))
        )
        assert len(served.asked) == 1
    assert notes.warnings == ["remote-failed"]
    assert [first.program, second.program] == ["miss", "miss"]
    # To wait is not to capture.
    assert first.seconds.capture + 1 <= first.seconds.total


def publish(unit: UnitResult, elsewhere: Path, root: Path) -> None:
    """Stores a unit as the process does that compiled it."""
    record = Store(elsewhere).unit(unit.key)
    assert record is not None
    Store(root).put_artifact(unit.data)
    Store(root).put_unit(record)


@pytest.mark.parametrize("end", ["stored", "given up"])
def test_a_unit_that_another_process_compiles_is_waited_for_at_the_end(
    job: Any, tmp_path: Path, end: str
) -> None:
    wanted = job()
    elsewhere = warm(wanted, tmp_path / "elsewhere")
    root = tmp_path / "cache"
    theirs = elsewhere.units[0]
    lease = Store(root).request(theirs.key).attempt()
    assert lease is not None
    notes = Notes()
    before: list[list[tuple[str, str]]] = []

    def waiting(what: str) -> None:
        notes.waits.append(what)
        before.append(list(notes.units))
        if end == "stored":
            publish(theirs, tmp_path / "elsewhere", root)
        lease.release()

    notes.waiting = waiting  # type: ignore[method-assign]
    ready = obtain_program(wanted, Store(root), notes)
    label = "piece_0 for 1:64 tokens"
    assert notes.waits == [f"process {os.getpid()} on {os.uname().nodename} compiles {label}"]
    assert [outcome for _, outcome in before[0]] == ["compiled", "compiled"]
    outcome = "hit" if end == "stored" else "compiled"
    assert notes.units[-1] == (label, outcome)
    assert [unit.outcome for unit in ready.units] == [outcome, "compiled", "compiled"]
    assert [u.artifact for u in ready.units] == [u.artifact for u in elsewhere.units]
    assert not list((root / "v1" / "locks").iterdir())


def test_a_unit_that_was_stored_since_it_was_looked_for_is_found(job: Any, tmp_path: Path) -> None:
    wanted = job()
    elsewhere = warm(wanted, tmp_path / "elsewhere")
    notes = Notes()

    def started(name: str, index: int, total: int) -> None:
        if index == 0:
            publish(elsewhere.units[1], tmp_path / "elsewhere", tmp_path / "cache")

    notes.unit_started = started  # type: ignore[method-assign]
    ready = obtain_program(wanted, Store(tmp_path / "cache"), notes)
    assert [unit.outcome for unit in ready.units] == ["compiled", "hit", "compiled"]
    assert notes.waits == []


def test_what_is_forced_is_compiled_after_another_process_too(job: Any, tmp_path: Path) -> None:
    wanted = job()
    first = warm(wanted, tmp_path)
    lease = Store(tmp_path).request(first.units[1].key).attempt()
    assert lease is not None
    notes = Notes()
    notes.waiting = lambda what: lease.release()  # type: ignore[method-assign]
    ready = warm(wanted, tmp_path, notes, force=True)
    assert counts(ready) == {"hit": 0, "dup": 0, "compiled": 3}


def test_an_error_in_compiling_gives_up_the_unit(job: Any, tmp_path: Path) -> None:
    notes = Notes()

    def started(name: str, index: int, total: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    notes.unit_started = started  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        warm(job(), tmp_path, notes)
    assert not list((tmp_path / "v1" / "locks").iterdir())


BESIDE = """
import json, os, signal, sys
from pathlib import Path
from vllmc.core.cache.store import Store
from vllmc.core.events import SilentObserver
from vllmc.core.job import make_job
from vllmc.core.models.resolve import resolve
from vllmc.core.pipeline import obtain_program
from vllmc.core.spec import CompileRange, CompileSpec
place = Path(sys.argv[1])
spec = CompileSpec(ranges=(CompileRange(1, 64),), backend="eager")
def job(model):
    model = resolve(str(place / model), layers=None)
    return make_job(model, spec, environment={}, cache_dir=place / "facts", origins={})
def warm(model, cache, observer):
    ready = obtain_program(job(model), Store(place / cache), observer)
    return {unit.key: unit.outcome for unit in ready.units}
def both(end):
    begun, told = os.pipe()
    goes_on, go = os.pipe()
    first = os.fork()
    if first == 0:
        class Slow(SilentObserver):
            def unit_started(self, name, index, total):
                if index == 0:
                    os.write(told, b"x")
                    os.read(goes_on, 1)
        (place / "first.json").write_text(json.dumps(warm("two", end, Slow())))
        os._exit(0)
    os.read(begun, 1)
    class Waits(SilentObserver):
        def waiting(self, what):
            assert f"process {first} on" in what, what
            if end == "killed":
                os.kill(first, signal.SIGKILL)
            else:
                os.write(go, b"x")
    second = warm("three", end, Waits())
    os.waitpid(first, 0)
    return second
job("two")  # what a process does once
print(json.dumps([both("killed"), both("stored")]))
"""


def test_two_models_that_share_pieces_compile_each_once(tmp_path: Path) -> None:
    save_llama(tmp_path / "two", layers=2)
    save_llama(tmp_path / "three", layers=3)
    done = subprocess.run(
        [sys.executable, "-c", BESIDE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    after_a_kill, second = json.loads(done.stdout)
    assert set(after_a_kill.values()) == {"compiled"}
    first = json.loads((tmp_path / "first.json").read_text())
    assert len(first) == 3
    assert first.keys() == second.keys(), "other layers, the same pieces"
    assert all({first[key], second[key]} == {"hit", "compiled"} for key in first)
    assert set(first.values()) == {"hit", "compiled"}, "each compiled some of them"


def test_pieces_differ_by_layer_only_where_a_baked_name_is_inside(job: Any, tmp_path: Path) -> None:
    unique = {
        (names, ops): warm(
            job(layers=3, layer_names=names, splitting_ops=ops), tmp_path
        ).record.pieces["unique"]
        for names in ("hoisted", "baked")
        for ops in (SILU, CompileSpec().splitting_ops)
    }
    assert unique == {
        ("hoisted", SILU): 3,
        ("baked", SILU): 4,
        ("hoisted", CompileSpec().splitting_ops): 3,
        ("baked", CompileSpec().splitting_ops): 3,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_names": "baked"},
        {"splitting_ops": SILU},
        {"splitting_ops": SILU, "layer_names": "baked"},
        {"split_kv_update": True},
        {"split_kv_update": True, "splitting_ops": SILU, "layer_names": "baked"},
        {"splitting_ops": (*CompileSpec().splitting_ops, *SILU)},
        {"dynamic_shapes": "backed"},
        {"dynamic_shapes": "backed-size-oblivious"},
        {"ranges": (CompileRange(1, 2), CompileRange(3, 64)), "sizes": (1, 8)},
    ],
    ids=str,
)
def test_every_way_to_cut_gives_the_same_tokens(
    job: Any, tmp_path: Path, expected: Any, changes: Any
) -> None:
    wanted = job(**changes)
    result = generate(wanted, warm(wanted, tmp_path))
    assert token_ids(result) == expected
    assert result.recompiles == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"splitting_ops": SILU, "layer_names": "baked"},
        pytest.param(
            {"dynamic_shapes": "backed", "ranges": (CompileRange(1, 64),), "sizes": (3,)},
            marks=pytest.mark.thorough,
        ),
    ],
    ids=str,
)
def test_every_way_to_compile_gives_the_same_tokens(job: Any, tmp_path: Path, changes: Any) -> None:
    wanted, plain = job(layers=1, **INDUCTOR, **changes), job(layers=1)
    result = generate(wanted, warm(wanted, tmp_path))
    assert token_ids(result) == token_ids(generate(plain, warm(plain, tmp_path)))
    assert result.recompiles == ()


@pytest.mark.slow
def test_inductor_gives_the_tokens_of_the_model(compiled: Any, expected: Any) -> None:
    _, ready, result = compiled
    assert ready.outcome == "compiled"
    assert token_ids(result) == expected
    assert result.recompiles == ()


@pytest.mark.slow
def test_a_hit_and_a_fresh_compile_are_one_program(job: Any, compiled: Any, tmp_path: Path) -> None:
    from torch._inductor.utils import fresh_cache

    wanted = job(layers=1, **INDUCTOR)
    root, _, _ = compiled
    warm(wanted, root)
    hit = warm(wanted, root)
    assert hit.program == "hit"
    with fresh_cache():
        fresh = warm(wanted, tmp_path)
    assert fresh.outcome == "compiled"
    # What the C++ compiler writes may name the directory that it worked in; the code may not.
    codes = [
        [Store(where).unit(u.key).code for u in ready.units]  # type: ignore[union-attr]
        for where, ready in ((root, hit), (tmp_path, fresh))
    ]
    assert codes[0] == codes[1]
    assert outputs(generate(wanted, fresh)) == outputs(generate(wanted, hit))


@pytest.mark.slow
def test_an_option_that_changes_the_key_and_not_the_code_is_a_dup(job: Any, compiled: Any) -> None:
    root, first, _ = compiled
    changed = job(**INDUCTOR, inductor=(("max_autotune_gemm_search_space", "EXHAUSTIVE"),))
    ready = warm(changed, root)
    assert (ready.program, ready.outcome) == ("miss", "compiled")
    assert counts(ready) == {"hit": 0, "dup": 3, "compiled": 0}
    assert [u.artifact for u in ready.units] == [u.artifact for u in first.units]
    assert [u.key for u in ready.units] != [u.key for u in first.units]
    assert counts(warm(changed, root)) == {"hit": 3, "dup": 0, "compiled": 0}


@pytest.mark.slow
def test_a_fresh_process_runs_a_hit_without_a_compiler(
    job: Any,
    compiled: Any,
    model_directory: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root, _, result = compiled
    hoisted = job(**INDUCTOR, splitting_ops=SILU)
    inside = generate(hoisted, warm(hoisted, root))
    script = tmp_path / "fresh.py"
    script.write_text(_SCRIPT)
    (tmp_path / "nothing").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR_")}
    environment |= {
        "PATH": str(tmp_path / "nothing"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "nothing"),
        "HF_HUB_OFFLINE": "1",
    }
    facts = tmp_path_factory.getbasetemp() / "facts"
    done = subprocess.run(
        [sys.executable, str(script), __file__, str(model_directory), str(root), str(facts)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert said["outputs"] == [outputs(result), outputs(inside)]
    assert said["imported"] == []
    assert list((tmp_path / "nothing").iterdir()) == []


_SCRIPT = """
import importlib.util, json, sys
from pathlib import Path

sys.path.append(str(Path(sys.argv[1]).parents[1] / "support"))
spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)

def job(**changes):
    return shared.make_job(
        shared.resolve(sys.argv[2]),
        shared.CompileSpec(
            ranges=(shared.CompileRange(1, 64),), backend="inductor", **changes
        ),
        environment={}, cache_dir=Path(sys.argv[4]), origins={},
    )

found = []
for wanted in (job(), job(splitting_ops=shared.SILU)):
    ready = shared.warm(wanted, Path(sys.argv[3]), may_compile=False)
    assert ready.program == "hit"
    found.append(shared.outputs(shared.generate(wanted, ready)))
heavy = (
    "torch._inductor.codecache", "torch._inductor.compile_fx", "torch._inductor.lowering",
    "torch._inductor.select_algorithm", "torch._functorch.aot_autograd",
    "vllmc.core.graph.capture", "vllmc.core.compiler.inductor",
)
print(json.dumps({"outputs": found, "imported": [m for m in heavy if m in sys.modules]}))
"""


class Pruner(Notes):
    """An observer that empties the cache of artifacts and units whenever a unit is done."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def unit_finished(self, name: str, outcome: str, seconds: float) -> None:
        super().unit_finished(name, outcome, seconds)
        for section in ("blobs", "units", "codes"):
            shutil.rmtree(Store(self._root).layout.top / section, ignore_errors=True)


def test_a_prune_while_it_is_compiled_leaves_the_program_whole(job: Any, tmp_path: Path) -> None:
    warm(job(layers=1), tmp_path)
    shutil.rmtree(Store(tmp_path).layout.top / "programs")
    ready = warm(job(), tmp_path, Pruner(tmp_path))
    assert (ready.program, ready.outcome) == ("miss", "partial")
    assert Store(tmp_path).verify() == ()
    assert warm(job(), tmp_path).program == "hit"


def test_uses_are_counted_with_the_seconds_that_they_saved(job: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)

    def uses() -> tuple[int, int, int, float]:
        stats = store.stats()
        return stats.hits, stats.misses, stats.dups, stats.seconds_saved

    warm(job(), tmp_path)
    assert uses() == (0, 3, 0, 0.0)
    for unit in store.readable_units():
        store.put_unit(dataclasses.replace(unit, seconds=2.5))
    warm(job(), tmp_path)
    assert uses() == (3, 3, 0, 7.5)
    warm(job(layers=3), tmp_path)
    assert uses() == (6, 3, 0, 15.0), "another program, with the same units"
    warm(job(ranges=(CompileRange(1, 32),)), tmp_path)
    assert uses() == (6, 6, 3, 15.0), "the eager backend's code does not depend on the range"
    warm(job(), tmp_path, may_compile=False)
    assert uses() == (9, 6, 3, 22.5)


def test_a_program_is_held_while_it_can_be_called(job: Any, tmp_path: Path) -> None:
    wanted = job()
    first = warm(wanted, tmp_path)
    used = Store(tmp_path).layout.used(wanted.key)

    def is_free() -> bool:
        with claimed(used) as free:
            return free

    assert not is_free()
    del first
    gc.collect()
    assert is_free()
    program = open_program(warm(wanted, tmp_path), wanted.model.build("real", wanted.spec))
    assert not is_free()
    del program
    gc.collect()
    assert is_free()
