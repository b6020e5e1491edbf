"""A job: one model to compile in one way, and the factors of its program key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from vllmc.core.cache.factors import program_factors, unit_factors
from vllmc.core.cache.key import Factor, JsonValue, key_of
from vllmc.core.models.built import build_model
from vllmc.core.models.guarded import read_guarded
from vllmc.core.models.model import Model
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat import system


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model to compile in one way, with the factors that make up its program key.

    `since` is when its modules began to be imported, in unix seconds: a source file that changed
    later may be another than the one that is traced.
    """

    model: Model
    spec: CompileSpec
    factors: tuple[Factor, ...]
    since: float = math.inf

    @property
    def label(self) -> str:
        """The model's name in records, which hold no absolute path: its last part stands for it."""
        path = Path(self.model.name)
        return path.name if path.is_absolute() else self.model.name

    @cached_property
    def key(self) -> str:
        """The program key, known before any capture."""
        return key_of(self.factors)

    @cached_property
    def compiler_factors(self) -> tuple[Factor, ...]:
        """What every artifact of the job depends on, whatever its graph."""
        return unit_factors(self.factors)

    def read_guarded(self, expressions: Sequence[str]) -> dict[str, JsonValue]:
        """What the Python values that a capture guarded on are now, by their expressions.

        Empty where factors and source files decide them all.
        """
        if not expressions or not self.model.made_by_code:
            return {}
        return read_guarded(expressions, build_model(self.model, self.spec))


def make_job(
    model: Model,
    spec: CompileSpec,
    *,
    environment: Mapping[str, str],
    cache_dir: Path,
    origins: Mapping[tuple[str, str], str],
    since: float = math.inf,
) -> Job:
    """Collects the factors. `since` is the job's.

    `origins` says where each option of the spec was set, and for `("model", "layers")` the number
    of layers.
    """
    layers_origin = origins.get(("model", "layers"), "flag")
    factors = program_factors(
        spec=spec,
        # A model knows only that its number of layers was asked for.
        model_factors=[
            replace(factor, origin=layers_origin) if factor.origin == "flag" else factor
            for factor in model.factors()
        ],
        environment=environment,
        cache_dir=cache_dir,
        option_origins=origins,
    )
    return Job(model=model, spec=spec, factors=factors, since=since)


def resolve_spec(spec: CompileSpec, model: Model) -> CompileSpec:
    """`spec` with `auto` decided: where the model is, else CUDA where there is a GPU; its dtype.

    Raises `VllmcError` (`no-device`) for a GPU that is not there, and what `Model.adapt` raises.
    """
    device = spec.device
    if device == "auto":
        device = model.info.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # A device is named once, so that `cuda` and `cuda:0` give one key.
    if device == "cuda":
        device = "cuda:0"
    system.device_properties(device)
    dtype = model.info.dtype if spec.dtype == "auto" else spec.dtype
    return model.adapt(replace(spec, device=device, dtype=dtype))
