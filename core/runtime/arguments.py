"""What a call brings, held against what a program was compiled for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllmc.core.errors import VllmcError
from vllmc.core.graph.layout import Argument, Layout
from vllmc.core.runtime.conditions import read_by, read_condition, spoken


class ArgumentCheck:
    """Checks the tensors of a call: dtypes, fixed sizes, relations between sizes, the layout.

    Relations are those of sizes with one name (a shape id), and what the model itself demands.
    """

    def __init__(self, layout: Layout, device: torch.device | None) -> None:
        self._arguments = layout.arguments
        self._names = layout.sizes
        self._device = device
        places = {name: index for index, name in enumerate(layout.sizes)}
        self._rows = [
            (
                getattr(torch, argument.dtype),
                tuple((dim, s) for dim, s in enumerate(argument.shape) if isinstance(s, int)),
                tuple((d, places[s]) for d, s in enumerate(argument.shape) if isinstance(s, str)),
                len(argument.shape),
            )
            for argument in layout.arguments
        ]
        paths = [argument.path for argument in layout.arguments]
        self._written = [paths.index(path) for path in layout.written]
        self._demands = [(text, read_condition(text, len(places))) for text in layout.demands]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """The sizes that vary, in the order of `layout.sizes`.

        Raises `VllmcError`: `bad-input` for a tensor that is not as compiled, `size-mismatch` where
        two sizes differ that are one, or a demand of the model's does not hold, `shared-memory` for
        an argument that is written to and lies in the memory of another.
        """
        sizes = [-1] * len(self._names)
        for index, (dtype, fixed, varying, dims) in enumerate(self._rows):
            tensor = tensors[index]
            shape = tensor.shape
            if (
                tensor.dtype is not dtype
                or len(shape) != dims
                or any(shape[dim] != size for dim, size in fixed)
                or not tensor.is_contiguous()
                or (self._device is not None and tensor.device != self._device)
            ):
                raise self._bad_input(self._arguments[index], tensor)
            for dim, place in varying:
                size = shape[dim]
                if sizes[place] == -1:
                    sizes[place] = size
                elif sizes[place] != size:
                    raise self._mismatch(place, tensors)
        if 0 in sizes[1:]:
            raise self._empty(sizes.index(0, 1), tensors)
        for text, holds in self._demands:
            if sizes[0] and not holds(*sizes):
                raise self._demanded(text, tensors)
        if self._written:
            self._check_memory(tensors)
        return sizes

    def _check_memory(self, tensors: Sequence[torch.Tensor]) -> None:
        """Compiled code reads and writes in an order of its own."""
        places = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        for index in self._written:
            if places[index] and places.count(places[index]) > 1:
                others = [place for place in range(len(places)) if place != index]
                other = next(i for i in others if places[i] == places[index])
                names = [self._arguments[i].path for i in (index, other)]
                raise VllmcError(
                    "shared-memory",
                    f"{names[0]} is written to, and lies in the same memory as {names[1]}",
                    hint=f"pass a copy: {names[1]}.clone()",
                )

    def _bad_input(self, wanted: Argument, tensor: torch.Tensor) -> VllmcError:
        sizes = ", ".join(map(str, wanted.shape))
        on = f" on {self._device}" if self._device is not None else ""
        return VllmcError(
            "bad-input",
            f"{wanted.path} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} "
            f"with the strides {list(tensor.stride())} on {tensor.device}",
            hint=f"pass a contiguous {wanted.dtype} tensor [{sizes}]{on}",
        )

    def _mismatch(self, place: int, tensors: Sequence[torch.Tensor]) -> VllmcError:
        name = self._names[place]
        found = self._found(place, tensors)
        (first, size), *others = found
        other, differing = next(row for row in others if row[1] != size)
        return VllmcError(
            "size-mismatch",
            f"{first} has {size} and {other} has {differing}, and both are '{name}'",
            context={"shape_id": name, **dict(found)},
            hint=f"sizes of one shape id are equal in every call: give both the same '{name}'",
        )

    def _empty(self, place: int, tensors: Sequence[torch.Tensor]) -> VllmcError:
        [(where, _), *_] = self._found(place, tensors)
        return VllmcError(
            "bad-input",
            f"{where} is 0, and no call is compiled for an empty size",
            hint="leave out the call where there is nothing to compute",
        )

    def _demanded(self, text: str, tensors: Sequence[torch.Tensor]) -> VllmcError:
        read = [self._found(place, tensors)[0] for place in read_by(text)]
        return VllmcError(
            "size-mismatch",
            f"the model demands {spoken(text, self._names)}, and "
            + " and ".join(f"{where} is {size}" for where, size in read),
            context=dict(read),
            hint="call it with sizes for which that holds; dimensions that are always equal can "
            "have one shape id in dynamic_arg_dims",
        )

    def _found(self, place: int, tensors: Sequence[torch.Tensor]) -> list[tuple[str, int]]:
        """Where the size at `place` stands among the arguments, and what it is there."""
        return [
            (f"{argument.path}.shape[{dim}]", tensor.shape[dim])
            for argument, tensor in zip(self._arguments, tensors, strict=True)
            for dim, name in enumerate(argument.shape)
            if name == self._names[place]
        ]
