"""The arguments of a call that nobody has made yet, for compiling before there is one."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Final

import torch

from vllmc.core.declare.declaration import Declaration
from vllmc.core.declare.dims import forward_parameters
from vllmc.core.declare.session import plainly
from vllmc.core.errors import UsageError
from vllmc.core.torch_compat.fake import like_weights
from vllmc.core.torch_compat.forward import positional_and_named

# Integers by what the field calls them.
_INTEGERS: Final = re.compile(r"(^|_)(ids?|positions?|ind(ex|ices)|len(gth)?s?|slots?|types?)$")
_SIZE: Final = 6
_MOST: Final = 64


def example_values(
    name: str, module: torch.nn.Module, declaration: Declaration
) -> Mapping[str, object]:
    """The arguments of one call of `module`, which `name` names, as its declaration gives them.

    Else they are guessed: what a forward cannot do without is a tensor, of `int64` where its name
    says ids, positions, indices or lengths, else of the dtype of the weights and with a last
    dimension of the width of some weight, such that the forward runs. Raises `UsageError`
    (`no-example-inputs`) where no guess fits.
    """
    if declaration.example_inputs is not None:
        given = dict(declaration.example_inputs(module))
        return _complete(name, module, given)
    with like_weights(module):
        for guess in itertools.islice(_guesses(module, declaration), _MOST):
            values = _complete(name, module, guess)
            if _runs(module, values):
                return values
    raise UsageError(
        "no-example-inputs",
        f"what {name} is called with can be guessed from neither its declaration nor its weights",
        hint="say it: @support_torch_compile(..., example_inputs=lambda module: "
        '{"x": torch.zeros(4, 16)})',
    )


def _complete(
    name: str, module: torch.nn.Module, given: Mapping[str, object]
) -> Mapping[str, object]:
    """All arguments in the order of the signature, defaults included."""
    signature = inspect.Signature(
        [p.replace(kind=p.KEYWORD_ONLY) for p in forward_parameters(module)]
    )
    try:
        bound = signature.bind(**given)
    except TypeError as error:
        raise UsageError(
            "no-example-inputs",
            f"the example inputs of {name} are not those of its forward: {error}",
            hint="example_inputs returns a dict with each argument by its name",
        ) from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _guesses(
    module: torch.nn.Module, declaration: Declaration
) -> Iterator[Mapping[str, torch.Tensor]]:
    floating = [p for p in module.parameters() if p.is_floating_point()]
    dtype = floating[0].dtype if floating else torch.float32
    widths = dict.fromkeys(
        [*(p.shape[-1] for p in floating if p.ndim), *(p.shape[0] for p in floating if p.ndim)]
    )
    needed = [p.name for p in forward_parameters(module) if p.default is p.empty]

    def tensor(name: str, width: int) -> torch.Tensor:
        dims = [d.dim for d in declaration.declared.dims.get(name, ())]
        integers = _INTEGERS.search(name) is not None
        shape = [1] * max((d + 1 for d in dims if d >= 0), default=1)
        if not integers:
            shape.append(width)
        for dim in dims:
            if -len(shape) <= dim:
                shape[dim] = _SIZE
        return torch.zeros(shape, dtype=torch.int64 if integers else dtype)

    for width in widths or (1,):
        yield {name: tensor(name, width) for name in needed}


def _runs(module: torch.nn.Module, values: Mapping[str, object]) -> bool:
    """Whether the forward takes `values`, of which only shapes and dtypes are looked at."""
    try:
        with torch.no_grad(), plainly():
            args, kwargs = positional_and_named(module, values)
            module.forward(*args, **kwargs)
    except Exception:  # noqa: BLE001 - whatever a wrong guess makes the user's code raise
        return False
    return True
