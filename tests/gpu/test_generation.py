"""Programs on a GPU generate what Transformers does there, with CUDA graphs and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from graphed import FAMILIES, PROMPTS, generated, logits

from vllmc.core.runtime.cuda_graphs import CudaRecorder, RecordingFailed
from vllmc.core.spec import CompileRange, Quantization

# torch warns of things on a GPU that it does not on a CPU.
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.filterwarnings("default")]

Make = Callable[..., Any]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    *((name, {"layer_names": "baked"}) for name in FAMILIES),
    *((name, {"split_kv_update": True}) for name in FAMILIES),
    ("llama", {"split_kv_update": True, "layer_names": "baked"}),
    ("llama", {"ranges": (CompileRange(1, 8), CompileRange(9, 512)), "sizes": (4,)}),
    ("llama", {"backend": "eager"}),
]
QUANTISED: list[tuple[str, dict[str, Any]]] = [
    *(("llama", {"quantize": mode}) for mode in get_args(Quantization)),
    ("gemma2", {"quantize": "fp8-static", "layer_names": "baked"}),
    ("qwen3", {"quantize": "fp8-dynamic", "layer_names": "baked"}),
]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_greedy_tokens_are_those_of_eager_transformers(
    cuda: str, subject: Make, warmed: Make, name: str, changes: dict[str, Any]
) -> None:
    made = warmed(name, **changes)
    plain, _ = generated(made.job, made.ready)
    assert plain == subject(name).expected
    found, report = generated(made.job, made.ready, CudaRecorder(cuda))
    assert found == subject(name).expected
    assert report is not None
    assert (report.sizes, report.plain, report.failed) == ((4,), {}, {})
    assert report.replayed > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_batch_size_up_to_the_largest_graph_gives_the_same_tokens(
    cuda: str, subject: Make, warmed: Make, name: str
) -> None:
    made, expected = warmed(name), subject(name).expected
    for size in (1, 3, 8, 11, 64):
        found, _ = generated(made.job, made.ready, CudaRecorder(cuda), batch_sizes=(size,))
        assert found == [expected[index % len(PROMPTS)] for index in range(size)]


def test_one_program_records_several_sizes(cuda: str, subject: Make, warmed: Make) -> None:
    """The largest first, then smaller ones, which reuse its pool, and the largest again."""
    made, expected = warmed("llama"), subject("llama").expected
    found, report = generated(made.job, made.ready, CudaRecorder(cuda), batch_sizes=(8, 4, 2, 1, 8))
    assert found == [expected[index % len(PROMPTS)] for index in range(8)]
    assert report is not None
    assert report.sizes == (1, 2, 4, 8)


@pytest.mark.parametrize(("name", "changes"), QUANTISED, ids=str)
def test_passes_change_nothing_that_a_quantised_model_says(
    cuda: str, warmed: Make, name: str, changes: dict[str, Any]
) -> None:
    fused = warmed(name, dtype="bfloat16", **changes)
    plain = warmed(name, dtype="bfloat16", passes=(), **changes)
    assert fused.job.key != plain.job.key
    a, b = (logits(made.job, made.ready, PROMPTS[0]) for made in (fused, plain))
    # Two roundings of bfloat16 apart, and what these are after a few layers.
    error = (a - b).norm() / b.norm()
    assert error < 0.05
    top = b.topk(2, dim=-1).values
    clear = top[:, 0] - top[:, 1] > (a - b).abs().amax()
    assert bool((a.argmax(-1) == b.argmax(-1))[clear].all())


@pytest.mark.parametrize("mode", get_args(Quantization))
def test_graphs_change_nothing_that_a_quantised_model_says(
    cuda: str, warmed: Make, mode: str
) -> None:
    made = warmed("llama", quantize=mode, dtype="bfloat16")
    plain, _ = generated(made.job, made.ready)
    found, report = generated(made.job, made.ready, CudaRecorder(cuda))
    assert found == plain
    assert report is not None
    assert report.failed == {}


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "bfloat16"), ("llama", "float16"), ("mixtral", "bfloat16")]
)
def test_half_precision_generates_the_same_with_graphs(
    cuda: str, warmed: Make, name: str, dtype: str
) -> None:
    made = warmed(name, dtype=dtype)
    plain, _ = generated(made.job, made.ready)
    found, _ = generated(made.job, made.ready, CudaRecorder(cuda))
    assert found == plain


def test_a_call_that_waits_for_the_device_is_no_graph_and_the_next_one_is(cuda: str) -> None:
    recorder = CudaRecorder(cuda)
    x = torch.ones(4, device=cuda)
    before = recorder.record(lambda: (x * 2,))
    for _ in range(2):
        with pytest.raises(RecordingFailed, match="not permitted when stream is capturing"):
            recorder.record(lambda: (torch.full((2,), float(x.sum()), device=cuda),))
    after = recorder.record(lambda: (x * 3,))
    x.fill_(5)
    for factor, (results, replay) in ((2, before), (3, after)):
        replay()
        assert results[0].tolist() == [5 * factor] * 4
    assert torch.cuda.current_stream(cuda) == torch.cuda.default_stream(cuda)


def test_graphs_are_recorded_when_all_others_are_gone_but_for_their_results(cuda: str) -> None:
    recorder = CudaRecorder(cuda)
    x = torch.ones(4, device=cuda)
    held, replay = recorder.record(lambda: (x * 2,))
    replay()
    del replay
    results, replay = recorder.record(lambda: (x * 3,))
    replay()
    assert (held[0].tolist(), results[0].tolist()) == ([2.0] * 4, [3.0] * 4)


def test_the_memory_of_a_graph_is_told_whatever_was_cached(cuda: str) -> None:
    recorder = CudaRecorder(cuda)
    size = 64 * 2**20
    # Freed, and so cached.
    torch.empty(4 * size, dtype=torch.uint8, device=cuda)
    before = recorder.used_bytes()
    kept = recorder.record(lambda: (torch.zeros(size, dtype=torch.uint8, device=cuda),))
    assert recorder.used_bytes() - before >= size
    assert kept[0][0].numel() == size
