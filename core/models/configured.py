"""What is the same of every model that a configuration describes. Imports no Transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from vllmc.core.cache.redaction import scrub
from vllmc.core.errors import VllmcError
from vllmc.core.models.model import ModelInfo
from vllmc.core.spec import CompileSpec, open_ended

if TYPE_CHECKING:  # importing them takes Dynamo and sympy, which a hit does without
    import torch

    from vllmc.core.declare.calls import Call


class ConfiguredModel(ABC):
    """A `Model` that Transformers builds from a configuration, and the engine runs."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        """The name under which the user asked for it."""
        return scrub(self._name)

    @property
    @abstractmethod
    def info(self) -> ModelInfo:
        """What the configuration says."""

    @property
    def made_by_code(self) -> bool:
        """No: the configuration and Transformers' own files decide what it is."""
        return False

    @property
    def runs_in_engine(self) -> bool:
        """Yes."""
        return True

    def adapt(self, spec: CompileSpec) -> CompileSpec:
        """See `Model.adapt`."""
        own = self.info.quantization
        if own is not None and spec.quantize not in own.modes:
            asked = "as they are" if spec.quantize is None else f"with {spec.quantize}"
            raise VllmcError(
                "quantized-weights",
                f"the weights of {self.name} were quantised for {own.modes[0]}, and it cannot be "
                f"run {asked}",
                context={"quantize": spec.quantize, "possible": own.modes},
                hint=f"--quantize {own.modes[0]}",
            )
        return open_ended(spec) if self.info.encoder is not None else spec

    def call(self, entry: torch.nn.Module) -> Call:
        """See `Model.call`."""
        from vllmc.core.declare.calls import example_call

        return example_call(self.name, entry)
