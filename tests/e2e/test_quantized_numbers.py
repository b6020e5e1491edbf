"""Logits of quantised models beside those of plain torch (`quantized_reference`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_programs import PROMPT, Case, case_maker, job_of, logits, warm
from quantized_reference import logits_of, quantized

from vllmc.core.spec import LayerNames, Quantization

MODELS = ("llama", "qwen3", "gemma")
MODES: tuple[Quantization, ...] = ("fp8-static", "fp8-dynamic", "int8-dynamic")

CLOSE = 0.02
"""Of the effect that quantising has. A number in the middle of two may be taken for either."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    return case_maker(tmp_path_factory.mktemp("quantised"))


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


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llama", "fp8-static"),
        ("qwen3", "fp8-dynamic"),
        ("gemma", "int8-dynamic"),
        *(
            pytest.param(name, mode, marks=pytest.mark.thorough)
            for name in MODELS
            for mode in MODES
            if (name, mode)
            not in {("llama", "fp8-static"), ("qwen3", "fp8-dynamic"), ("gemma", "int8-dynamic")}
        ),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "names"), [("float32", "hoisted"), ("bfloat16", "baked")], ids=["hoisted", "baked"]
)
def test_logits_are_those_of_a_model_quantised_by_hand(
    name: str, mode: Quantization, dtype: str, names: LayerNames, case: Any, tmp_path: Path
) -> None:
    given = case(name, dtype)
    job = job_of(given, tmp_path, quantize=mode, layer_names=names, backend="eager")
    assert_close(logits(job, warm(job, tmp_path)), given, mode)


@pytest.mark.parametrize("mode", ["fp8-static", "int8-dynamic"])
def test_compiled_code_gives_the_same_logits(mode: Quantization, case: Any, tmp_path: Path) -> None:
    given = case("llama", "float32")
    job = job_of(given, tmp_path, quantize=mode)
    assert_close(logits(job, warm(job, tmp_path)), given, mode)
