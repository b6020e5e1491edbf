"""Logits of quantised models beside those of plain torch (`quantized_reference`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_reference import PROMPTS, VOCAB, input_scales, logits_of, make_model, quantized
from transformers import AutoModelForCausalLM, PreTrainedModel

from vllmc.core.cache.store import Store
from vllmc.core.events import SilentObserver
from vllmc.core.graph.layout import Layout
from vllmc.core.job import make_job, resolve_spec
from vllmc.core.models.built import build_model
from vllmc.core.models.resolve import resolve
from vllmc.core.pipeline import obtain_program, open_program
from vllmc.core.runtime.calibration import calibrate
from vllmc.core.runtime.sampler import SamplingParams
from vllmc.core.runtime.workload import Limits, make_engine
from vllmc.core.spec import CompileSpec, LayerNames, Quantization

MODELS = ("llama", "qwen3", "gemma")
MODES: tuple[Quantization, ...] = ("fp8-static", "fp8-dynamic", "int8-dynamic")
*CALIBRATION, PROMPT = PROMPTS

CLOSE = 0.02
"""Of the effect that quantising has. A number in the middle of two may be taken for either."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model in a directory, and what it makes of the prompt in the dtype."""

    directory: Path
    model: PreTrainedModel
    dtype: str
    plain: torch.Tensor
    scales: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    root = tmp_path_factory.mktemp("quantised")
    known: dict[tuple[str, str], Case] = {}

    def make(name: str, dtype: str) -> Case:
        if not (root / name).exists():
            make_model(name).save_pretrained(root / name)
        if (name, dtype) not in known:
            model = AutoModelForCausalLM.from_pretrained(
                root / name, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            ).eval()
            known[name, dtype] = Case(
                directory=root / name,
                model=model,
                dtype=dtype,
                plain=logits_of(model, PROMPT),
                scales=input_scales(model, CALIBRATION),
            )
        return known[name, dtype]

    return make


def logits(
    case: Case, mode: Quantization, names: LayerNames, cache: Path, backend: str = "eager"
) -> torch.Tensor:
    """What the compiled model makes of the prompt, after each token: `[T, vocab]`, in float64."""
    model = resolve(str(case.directory))
    spec = resolve_spec(
        CompileSpec(quantize=mode, layer_names=names, backend=backend, dtype=case.dtype), model
    )
    job = make_job(model, spec, environment={}, cache_dir=cache, origins={})
    ready = obtain_program(job, Store(cache), SilentObserver())
    layout = Layout.from_json(ready.record.program)
    limits = Limits(
        vocab_size=VOCAB,
        max_position=128,
        dtype=getattr(torch, case.dtype),
        device="cpu",
    )
    how = partial(
        calibrate,
        prompts=CALIBRATION,
        attention=layout.attention,
        limits=limits,
        encoder=None,
    )
    entry = build_model(model, spec, "real", how if mode == "fp8-static" else None)
    program = open_program(ready, entry)
    found = []

    def step(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        found.append(program(ids, positions, torch.arange(ids.shape[1])))
        return found[-1][rows]

    params = SamplingParams(max_new_tokens=1)
    engine = make_engine(step, layout.attention, [[PROMPT]], params, limits, max_tokens=64)
    engine.generate([PROMPT], params)
    return found[0].double()


def assert_close(found: torch.Tensor, case: Case, mode: Quantization) -> None:
    with quantized(case.model, mode, case.scales):
        expected = logits_of(case.model, PROMPT)
    effect = (expected - case.plain).norm()
    # Else nothing was quantised.
    assert effect > 0.02 * case.plain.norm()
    assert (found - expected).norm() <= CLOSE * effect
    top = expected.topk(2).values
    certain = top[:, 0] - top[:, 1] > 2 * (found - expected).abs().max()
    assert certain.sum() > len(PROMPT) / 2
    assert torch.equal(found.argmax(1)[certain], expected.argmax(1)[certain])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("dtype", "names"), [("float32", "hoisted"), ("bfloat16", "baked")], ids=["hoisted", "baked"]
)
def test_logits_are_those_of_a_model_quantised_by_hand(
    name: str, mode: Quantization, dtype: str, names: LayerNames, case: Any, tmp_path: Path
) -> None:
    given = case(name, dtype)
    assert_close(logits(given, mode, names, tmp_path), given, mode)


@pytest.mark.parametrize("mode", ["fp8-static", "int8-dynamic"])
def test_compiled_code_gives_the_same_logits(mode: Quantization, case: Any, tmp_path: Path) -> None:
    given = case("llama", "float32")
    assert_close(logits(given, mode, "hoisted", tmp_path, "inductor"), given, mode)
