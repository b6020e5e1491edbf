"""Building a model as a spec wants it. Imports no Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllmc.core.models.model import Model, Weights
from vllmc.core.spec import CompileSpec

if TYPE_CHECKING:
    import torch

    from vllmc.core.models.quantized import Calibrate


def build_model(
    model: Model, spec: CompileSpec, weights: Weights = "fake", calibrate: Calibrate | None = None
) -> torch.nn.Module:
    """The entry module of `model`, with its linears quantised where `spec` says so.

    Scales of activations change no graph: without `calibrate` they are those of the model's
    checkpoint, or 1. Raises what `Model.build`, `Model.own_scales` and `quantize` raise.
    """
    entry = model.build(weights, spec)
    if spec.quantize is None:
        return entry
    # It takes Transformers' modeling code, which a prediction does without.
    from vllmc.core.models.quantized import quantize

    own = model.own_scales() if weights == "real" else {}
    known = model.info.quantization
    quantize(
        entry,
        spec.quantize,
        own=own,
        kept=() if known is None else known.kept,
        calibrate=calibrate,
    )
    return entry
