"""Whether a torch that is newer than vllmc knows does what vllmc asks of it.

One tiny piece is captured, compiled, taken apart, loaded and run at two sizes, as every piece is,
and compared with eager. That holds for the code of the CPU; what is generated for a GPU is not
looked at. That a torch passed is remembered below the cache, so it is paid once for each build.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sympy
import torch

from vllmc.core.cache.facts import recall, remember
from vllmc.core.errors import VllmcError
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.system import torch_key_hex
from vllmc.core.torch_compat.version import NEWEST, OLDEST, install_known, spelled

if TYPE_CHECKING:
    from vllmc.core.torch_compat.inductor import Generated
    from vllmc.core.torch_compat.shapes import ShapeScope

_CAPTURED_AT: Final = 17
_LIMIT: Final = 64
_SIZES: Final = (1, 5)
_PASSED: Final = "passed"


class Differs(Exception):
    """What came out is not what eager gives."""


class _Tiny(torch.nn.Module):
    """A matrix product, which is a library call, and a softmax, which is a kernel."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.arange(64, dtype=torch.float32).reshape(8, 8)
        self.weight = torch.nn.Parameter(values.sin(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """The softmax of the product, twice as large."""
        return (torch.softmax(x @ self.weight, -1) * 2,)


def check_newer(cache: Path | None) -> None:
    """Does nothing if the newer torch here has passed. Raises `VllmcError` (`torch-unknown`).

    A C++ compiler that is missing says nothing of torch: then nothing is remembered, and whoever
    compiles for the CPU is told.
    """
    name = f"self_check-{hashlib.sha256(_identity(cache).encode()).hexdigest()}"
    if recall(cache, name) == _PASSED:
        return
    try:
        passed = _compare()
    except Exception as error:
        raise VllmcError(
            "torch-unknown",
            f"torch {torch.__version__} is newer than vllmc knows, and a tiny piece that is "
            "compiled with it does not run as it should",
            context={
                "known": f"{spelled(OLDEST)} to {spelled(NEWEST)}",
                "cause": f"{type(error).__name__}: {error}".strip()[:2000],
                "at": _place(error),
            },
            hint=f"{install_known()}, or a newer vllmc: pip install --upgrade vllmc",
        ) from error
    if passed:
        remember(cache, name, _PASSED)


def _identity(cache: Path | None) -> str:
    """The build of torch, and vllmc's code that uses it: another vllmc may ask for other things."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    own = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
    return f"{torch_key_hex(cache)} {own}"


def _compare() -> bool:
    """Whether the piece could be compiled. Raises whatever torch does, and `Differs`."""
    # Imported here, so that what this torch lacks is found within the check.
    from vllmc.core.torch_compat.config import applied, vllmc_overrides
    from vllmc.core.torch_compat.inductor import NoCompilerError, generate

    module = _Tiny()
    with applied(vllmc_overrides(CompileSpec())):
        piece = _captured(module)
        try:
            generated = generate(piece.graph, piece.inputs, piece.scope)
        except NoCompilerError:
            return False
    call = _loaded(generated)
    for size in _SIZES:
        x = torch.linspace(-1, 1, size * 8).reshape(size, 8)
        given = {"size": size, "x": x, "weight": module.weight}
        (result,) = call([given[role] for role in piece.roles])
        (expected,) = module(x)
        if result.shape != expected.shape or not torch.allclose(result, expected, atol=1e-5):
            raise Differs(f"for {size} rows it gives {result.tolist()}, eager {expected.tolist()}")
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """The captured graph with fake inputs of `scope`, and what each of them stands for."""

    graph: torch.fx.GraphModule
    inputs: tuple[object, ...]
    roles: tuple[str, ...]
    scope: ShapeScope


def _captured(module: torch.nn.Module) -> _Piece:
    from vllmc.core.torch_compat.capture import capture_full_graph, mark_dimension
    from vllmc.core.torch_compat.shapes import ShapeScope, SymbolRange

    x = torch.zeros(_CAPTURED_AT, 8)
    mark_dimension(x, 0, kind="unbacked", shape_id="rows", low=1, high=_LIMIT)
    raw = capture_full_graph(module, {"x": x}, "unbacked")
    placeholders = raw.module.graph.find_nodes(op="placeholder")
    values = [node.meta["example_value"] for node in placeholders]
    symbols = {s for value in values for size in _sizes(value) for s in size.free_symbols}
    scope = ShapeScope([SymbolRange(symbol=s, low=1, high=_LIMIT) for s in symbols])
    inputs: list[object] = []
    roles = []
    for node, value in zip(placeholders, values, strict=True):
        if isinstance(value, torch.Tensor):
            stride = [_expression(step) for step in value.stride()]
            inputs.append(scope.tensor(_sizes(value), stride, dtype=value.dtype, device="cpu"))
            roles.append("weight" if raw.sources[node.name].endswith("['weight']") else "x")
        else:
            inputs.append(scope.size(_expression(value)))
            roles.append("size")
    return _Piece(graph=raw.module, inputs=tuple(inputs), roles=tuple(roles), scope=scope)


def _sizes(value: torch.Tensor | torch.SymInt) -> list[sympy.Expr]:
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return [_expression(size) for size in sizes]


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _loaded(generated: Generated) -> Callable[[list[Any]], tuple[Any, ...]]:
    from vllmc.core.torch_compat import native
    from vllmc.core.torch_compat.wrapper import reduce_wrapper

    kernels = {kernel.name: kernel.library for kernel in generated.kernels}
    constants = dict(generated.constants)
    reduced = reduce_wrapper(generated.wrapper, provided=frozenset([*kernels, *constants]))
    provided: dict[str, object] = {
        name: native.load_kernel(name, library) for name, library in kernels.items()
    }
    provided |= constants
    provided[native.EXTERN_KERNELS] = native.extern_kernels(dict(reduced.products))
    return native.Wrapper(reduced.source, provided, name="self-check")


def _place(error: BaseException) -> str:
    """Where it was raised, as `file.py:12 in function`."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno} in {last.name}"
