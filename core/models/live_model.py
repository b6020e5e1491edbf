"""A module of a running program as a model: it is there already, and so are its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from vllmc.core.declare.calls import Call, bad_argument, describe_call
from vllmc.core.declare.containers import leaves
from vllmc.core.errors import UsageError
from vllmc.core.models.model import ModelInfo
from vllmc.core.models.module_model import ModuleModel
from vllmc.core.spec import CompileSpec


class LiveModel(ModuleModel):
    """`module`, of a declared class, called with `values` by argument name.

    Its program is the one that `vllmc warm module:Class` compiles, where class and call are alike.
    """

    def __init__(self, module: torch.nn.Module, values: Mapping[str, object]) -> None:
        cls = type(module)
        self._module, self._values = module, values
        super().__init__(f"{cls.__module__}:{cls.__qualname__}", module)

    @property
    def info(self) -> ModelInfo:
        """What the module is, and where."""
        tensors = (*self._sample.parameters(), *(tensor for _, tensor in self._tensors()))
        device = str(tensors[0].device) if tensors else "cpu"
        return replace(super().info, device=device)

    def adapt(self, spec: CompileSpec) -> CompileSpec:
        """See `Model.adapt`. Raises `UsageError` (`spec-mismatch`)."""
        info = self.info
        for name, asked, there in (
            ("device", spec.device, info.device),
            ("dtype", spec.dtype, info.dtype),
        ):
            if asked != there:
                raise UsageError(
                    "spec-mismatch",
                    f"the spec says {name} {asked}, and the module's weights are {there}",
                    hint=f'move the module before its first call, or leave {name}="auto"',
                )
        return super().adapt(spec)

    def call(self, *_: object) -> Call:
        """The call that is made. Raises `UsageError` (`bad-argument`) for tensors of a subclass."""
        for path, tensor in self._tensors():
            # A subclass may compute otherwise.
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                raise bad_argument(path, tensor)
        return describe_call(self._declaration().declared, self._values)

    def build(self, *_: object, **__: object) -> torch.nn.Module:
        """The module as it is."""
        return self._sample

    def _instantiate(self, *_: object, **__: object) -> torch.nn.Module:
        """Moving it, even to where it is, would change what programs are bound to."""
        return self._module

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in self._values.items():
            for path, leaf in leaves(name, value):
                if isinstance(leaf, torch.Tensor):
                    yield path, leaf
