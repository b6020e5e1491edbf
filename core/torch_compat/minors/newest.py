"""What differs between the minor versions of torch, as the newest has it: 2.15.

Each older minor that differs is a class of its own, which inherits from the next newer one and has
only what changed in between. Nothing here imports a compiler before it is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch._guards import Guard
    from torch._subclasses.fake_tensor import FakeTensorMode


class Newest:
    """The interface, and torch 2.15."""

    local_overrides = True
    """Whether config overrides are context-local: else they are the whole process's."""

    takes_least_size = True
    """Whether `mark_unbacked_size` tells torch the least size, and code may branch on it."""

    absent: frozenset[tuple[str, str]] = frozenset({("inductor", "_cache_config_factory_keys")})
    """Options that it lacks of those that vllmc names: (group, name).

    vllmc names those that it sets (`config.VLLMC_SETS` and `cpp.march`), `config_scope.EXCLUDED`,
    and in group `dynamo` `CAPTURE`.
    """

    keyed_files: tuple[str, ...] = (
        "codegen/aoti_runtime/interface.cpp",
        "codegen/aoti_runtime/streams.h",
        "script.ld",
    )
    """What Inductor's key of torch covers besides Python, in `torch/_inductor`."""

    def opaque_base(self) -> Any:
        """The class that opaque types inherit from."""
        from torch._custom_class_base import CustomClassBase

        return CustomClassBase

    def register_value_type(self, cls: type, *, hoist: bool) -> None:
        """Makes `cls` an opaque type whose objects count by their value."""
        from torch._library.opaque_object import register_custom_class

        register_custom_class(cls, typ="constant", hoist=hoist)

    def is_opaque_value(self, value: object) -> bool:
        """Whether `value` is an object of an opaque type, or its stand-in."""
        from torch._library.opaque_object import is_custom_class_obj

        return bool(is_custom_class_obj(value))

    def before_fake_modes(self) -> None:
        """Makes it safe to enter a fake mode in any thread. Called before each; it is cheap."""

    def mark_unbacked_size(self, tensor: torch.Tensor, dim: int, *, low: int) -> None:
        """Has a dimension compiled as an unbacked size of at least `low`."""
        from torch._dynamo.decorators import mark_unbacked

        mark_unbacked(tensor, dim, min=low)

    @contextmanager
    def unguarded_reads(self) -> Iterator[list[str]]:
        """Yields the list that gets, in the block, what Dynamo reads without a guard on it.

        As expressions like those of guards.
        """
        yield []

    def guarded_attribute(self, guard: Guard) -> tuple[str, str]:
        """The object and the attribute of a guard that asks whether the one has the other."""
        return guard.name, guard.create_fn.keywords["attr"]

    def compile_bundle(
        self, module: torch.fx.GraphModule, inputs: Sequence[object], fake_mode: FakeTensorMode
    ) -> Any:
        """Inductor's own artifact of `module` for `inputs`, which are fake tensors of `fake_mode`.

        That mode is the one of the tracing context too.
        """
        from torch._inductor.standalone_compile import standalone_compile

        return standalone_compile(
            module,
            list(inputs),
            dynamic_shapes="from_example_inputs",
            fake_mode=fake_mode,
            options={},
            aot=True,
        )
