"""Recorded steps: where a graph would read and write, with real programs, and replays that call."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from graphed import (
    FAMILIES,
    NEW_TOKENS,
    PROMPTS,
    Replayed,
    entry_of,
    expected,
    generated,
    limits_of,
    save,
    warm,
)
from tiny_models import job_of

from vllmc.core.graph.layout import Argument, GraphInput, Layout, Obstacle, OpStep, UnitStep
from vllmc.core.pipeline import open_program
from vllmc.core.runtime.cuda_graphs import (
    DEFAULT_SIZES,
    PLAIN_STEPS,
    CudaGraphs,
    RecordingFailed,
    is_recorded,
    recorder_for,
)
from vllmc.core.runtime.program import Program, Variant, link
from vllmc.core.runtime.sampler import SamplingParams
from vllmc.core.runtime.workload import run_workload
from vllmc.core.spec import CompileRange
from vllmc.kernels.forward_context import AttentionMetadata, ForwardContext, forward_context
from vllmc.kernels.kv_cache import LayerCache

ARGUMENTS = (
    Argument(path="x", dtype="float32", shape=(1, "tokens", 2)),
    Argument(path="rows", dtype="int64", shape=("rows",)),
)
INPUTS = (
    GraphInput(kind="activation", name="x"),
    GraphInput(kind="activation", name="rows"),
)


def double(args: list[Any]) -> tuple[Any, ...]:
    return (args[0] * 2,)


def chosen(args: list[Any]) -> tuple[Any, ...]:
    return (args[0][0, args[1]],)


def program(recorder: Replayed, *pieces: Any, **fields: Any) -> Program:
    """`double(x)`, one more outside of the pieces, and `rows` of the double of that."""
    layout = Layout(
        **{
            "arguments": ARGUMENTS,
            "pieces": ("piece_0", "piece_2"),
            "ranges": ("1:64",),
            "inputs": INPUTS,
            "steps": (
                UnitStep(piece=0, args=("p0",), results=("v0",)),
                OpStep(
                    target="call_function:_operator.add",
                    args=({"ref": "v0"}, 1),
                    kwargs={},
                    result="v1",
                ),
                UnitStep(piece=0, args=("v1",), results=("v2",)),
                UnitStep(piece=1, args=("v2", "p1"), results=("v3",)),
            ),
            "result": {"ref": "v3"},
            "attention": (),
            **fields,
        }
    )
    functions = pieces or (double, chosen)
    variants = [Variant(range=CompileRange(1, 64), pieces=functions)]
    graphs = CudaGraphs(layout, recorder, (1, 2, 4))
    return link(layout, torch.nn.Module(), variants, None, graphs)


def call(made: Program, tokens: int, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the program gives for new tensors, and what it should."""
    rows = tokens if rows is None else rows
    x, chosen_rows = torch.randn(1, tokens, 2), torch.randint(tokens, (rows,))
    return made(x, chosen_rows), ((x * 2 + 1) * 2)[0, chosen_rows]


def call_often(made: Program, tokens: int, times: int = PLAIN_STEPS + 3) -> None:
    for _ in range(times):
        found, expected = call(made, tokens)
        torch.testing.assert_close(found, expected)


def report_of(made: Program) -> Any:
    assert made.graphs is not None
    return made.graphs.report()


def test_sizes_are_dense_where_they_are_small() -> None:
    assert DEFAULT_SIZES == (1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 40, 48, 56, 64)


@pytest.mark.parametrize(
    ("sizes", "recorded"),
    [((4, 4), True), ((4,), True), ((4, 1), False), ((3, 3), False), ((), False)],
)
def test_only_steps_all_of_whose_tokens_are_decoded_are_recorded(
    sizes: Sequence[int], recorded: bool
) -> None:
    assert is_recorded(sizes, frozenset({1, 2, 4})) is recorded


def test_a_recorded_step_gives_what_the_plain_one_does() -> None:
    made = program(recorder := Replayed())
    for tokens in (4, 1, 2, 4, 3, 1):
        call_often(made, tokens)
    # Three units each for 4, 1 and 2 tokens; 3 is no size to record.
    assert recorder.recorded == 9
    assert report_of(made).sizes == (1, 2, 4)


def test_a_size_is_recorded_when_it_has_come_a_few_times() -> None:
    made = program(recorder := Replayed())
    for _ in range(PLAIN_STEPS):
        call(made, 2)
    assert recorder.recorded == 0
    call(made, 2)
    assert recorder.recorded == 3
    assert report_of(made).replayed == 0
    call(made, 2)
    assert recorder.recorded == 3
    assert report_of(made).replayed == 1


def test_a_prefill_of_a_recorded_size_runs_without_graphs() -> None:
    made = program(recorder := Replayed())
    for _ in range(PLAIN_STEPS + 3):
        found, expected = call(made, 4, rows=1)
        torch.testing.assert_close(found, expected)
    assert recorder.recorded == 0


def test_results_stay_when_the_next_step_has_run() -> None:
    made = program(Replayed())
    call_often(made, 2)
    first, expected = call(made, 2)
    call(made, 2)
    torch.testing.assert_close(first, expected)


def test_steps_of_all_sizes_read_their_arguments_from_the_same_memory() -> None:
    seen: dict[int, set[int]] = {}

    def piece(args: list[Any]) -> tuple[Any, ...]:
        seen.setdefault(args[0].shape[1], set()).add(args[0].data_ptr())
        return (args[0] * 2,)

    steps = (
        UnitStep(piece=0, args=("p0",), results=("v2",)),
        UnitStep(piece=1, args=("v2", "p1"), results=("v3",)),
    )
    made = program(Replayed(), piece, chosen, steps=steps)
    for tokens in (1, 4, 2):
        for _ in range(PLAIN_STEPS):
            call(made, tokens)
    seen.clear()
    given = [torch.randn(1, tokens, 2) for tokens in (1, 4, 2)]
    for x in [*given, *given]:
        made(x, torch.arange(x.shape[1]))
    assert seen[1] == seen[2] == seen[4]
    assert len(seen[1]) == 1


def test_what_a_recorded_piece_gives_the_next_one_is_not_copied() -> None:
    seen: list[torch.Tensor] = []

    def keep(args: list[Any]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (args[0][0, args[1]],)

    steps = (
        UnitStep(piece=0, args=("p0",), results=("v2",)),
        UnitStep(piece=1, args=("v2", "p1"), results=("v3",)),
    )
    made = program(Replayed(), double, keep, steps=steps)
    for _ in range(PLAIN_STEPS):
        call(made, 2)
    seen.clear()
    made(x := torch.randn(1, 2, 2), torch.arange(2))
    torch.testing.assert_close(seen[-1], x * 2)
    # It is the very memory that the first piece's graph writes to.
    made(torch.zeros(1, 2, 2), torch.arange(2))
    assert seen[0] is seen[-1]
    assert not seen[0].any()


def test_a_piece_with_an_obstacle_runs_between_recorded_ones() -> None:
    obstacles = (Obstacle(piece=0, cause="vllmc_test::sync may not be recorded"),)
    made = program(recorder := Replayed(), obstacles=obstacles)
    call_often(made, 2)
    assert recorder.recorded == 1
    assert report_of(made).plain == {"piece_0": "vllmc_test::sync may not be recorded"}


def test_a_program_that_writes_to_its_arguments_is_not_recorded() -> None:
    made = program(recorder := Replayed(), written=("x",))
    call_often(made, 2)
    assert recorder.recorded == 0
    assert set(report_of(made).plain) == {"piece_0", "piece_2"}


class _Failing(Replayed):
    """Refuses what returns as many dimensions as it was given: `double`."""

    def __init__(self) -> None:
        super().__init__()
        self.tried = 0

    def record(self, run: Callable[[], Sequence[Any]]) -> Any:
        if run()[0].ndim == 2:
            return super().record(run)
        self.tried += 1
        raise RecordingFailed("operation not permitted when stream is capturing")


def test_a_piece_that_fails_runs_plainly_and_is_not_tried_again() -> None:
    made = program(recorder := _Failing())
    call_often(made, 2)
    call_often(made, 4)
    assert recorder.tried == 1
    assert report_of(made).failed == {"piece_0": "operation not permitted when stream is capturing"}
    assert report_of(made).graphs == 2


def test_inputs_whose_elements_share_memory_are_not_recorded() -> None:
    def widened(args: list[Any]) -> tuple[Any, ...]:
        return (args[0][:, :, :1].expand(-1, -1, 2),)

    obstacles = (Obstacle(piece=0, cause="it waits"),)
    steps = (
        UnitStep(piece=0, args=("p0",), results=("v2",)),
        UnitStep(piece=1, args=("v2", "p1"), results=("v3",)),
    )
    made = program(Replayed(), widened, chosen, obstacles=obstacles, steps=steps)
    for _ in range(PLAIN_STEPS + 2):
        x, rows = torch.randn(1, 2, 2), torch.arange(2)
        torch.testing.assert_close(made(x, rows), x[0, :, :1].expand(-1, 2))
    assert report_of(made).failed == {"piece_2": "elements of what it is given share memory"}


def test_inputs_with_gaps_between_their_elements_are_recorded() -> None:
    def sliced(args: list[Any]) -> tuple[Any, ...]:
        return (args[0].repeat(1, 1, 2)[:, :, :2],)

    obstacles = (Obstacle(piece=0, cause="it waits"),)
    steps = (
        UnitStep(piece=0, args=("p0",), results=("v2",)),
        UnitStep(piece=1, args=("v2", "p1"), results=("v3",)),
    )
    made = program(recorder := Replayed(), sliced, chosen, obstacles=obstacles, steps=steps)
    for _ in range(PLAIN_STEPS + 2):
        x, rows = torch.randn(1, 2, 2), torch.arange(2)
        torch.testing.assert_close(made(x, rows), x[0])
    assert (report_of(made).failed, recorder.recorded) == ({}, 1)


def test_a_program_that_is_dropped_holds_no_memory() -> None:
    """Nor until the garbage is collected, which the memory of a GPU does not call for."""
    places: list[weakref.ref[torch.Tensor]] = []

    def noted(args: list[Any]) -> tuple[Any, ...]:
        places.append(weakref.ref(args[0]))
        return (args[0] * 2,)

    made = program(Replayed(), noted, chosen)
    call_often(made, 2)
    gc.disable()
    try:
        assert places[-1]() is not None
        del made
        assert places[-1]() is None
    finally:
        gc.enable()


def test_there_is_nothing_to_record_with_on_a_cpu() -> None:
    assert recorder_for("cpu") is None


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model of a family, with weights."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        if not (root / name).exists():
            save(name, root / name)
        return root / name

    return make


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    ("mixtral", {"layer_names": "baked"}),
    ("llama", {"split_kv_update": True}),
    ("gemma2", {"split_kv_update": True, "layer_names": "baked"}),
    # Its scales are those of all rows: one more would change them.
    ("llama", {"quantize": "int8-dynamic"}),
]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_the_engine_generates_the_same_with_recorded_steps(
    directory: Callable[[str], Path], tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    job = job_of(directory(name), tmp_path, backend="eager", **changes)
    ready = warm(job, tmp_path)
    plain, _ = generated(job, ready)
    found, report = generated(job, ready, recorder := Replayed())
    assert found == plain
    assert report is not None
    assert (report.sizes, report.failed) == ((4,), {})
    assert report.replayed > 0
    assert report.bytes == recorder.recorded * 1000 > 0


def test_graphs_are_made_anew_for_the_caches_of_another_engine(
    directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """Keys are stored inside the pieces, at addresses that a graph would hold."""
    job = job_of(directory("llama"), tmp_path, backend="eager", split_kv_update=True)
    ready = warm(job, tmp_path)
    made = open_program(ready, entry_of(job, ready), recorder=Replayed())
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        found = run_workload(made, prompts, params, limits_of(job)).outputs
        plain, _ = generated(job, ready, prompts=prompts)
        assert [output.token_ids for output in found] == plain


def test_a_context_that_holds_the_same_caches_is_no_other() -> None:
    """One that is made for each step, with the same caches; with others, all is recorded anew."""
    made = program(recorder := Replayed())
    one, other = (LayerCache(torch.zeros(16, 1, 2), torch.zeros(16, 1, 2)) for _ in range(2))
    metadata = AttentionMetadata(slots=torch.arange(2), sequences=())
    for cache, recorded in ((one, 3), (other, 6)):
        for _ in range(PLAIN_STEPS + 3):
            with forward_context(ForwardContext(metadata=metadata, caches={"layer": cache})):
                call_often(made, 2, times=1)
        assert recorder.recorded == recorded
        # Of those there are: what was dropped takes nothing.
        assert report_of(made).bytes == 3000


def test_what_is_compared_here_is_what_transformers_generates(
    directory: Callable[[str], Path], tmp_path: Path
) -> None:
    model = save("llama", tmp_path / "llama")
    job = job_of(directory("llama"), tmp_path, backend="eager")
    found, _ = generated(job, warm(job, tmp_path), Replayed())
    assert found == expected(model)
