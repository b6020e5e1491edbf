"""What the first compilation of a process pays for, paid before there is something to compile."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch._inductor import config
from torch._inductor.async_compile import get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch.hub import tqdm

from vllmc.core.torch_compat.inductor import CompileError, NoCompilerError, call_inductor, generate
from vllmc.core.torch_compat.shapes import ShapeScope, SymbolRange

_TOKENS = sympy.Symbol("s0", integer=True, nonnegative=True)
_KERNEL = 'extern "C" void kernel(float* a) {}'


def warm_up() -> None:
    """Imports and sets up what compiling for the CPU needs, under the configuration in force.

    Chooses the instruction set and precompiles the C++ header, if none is there, and has Inductor
    lower a graph that needs no kernel. Starts no thread. What fails here, fails again when
    something is compiled, and is told of then.
    """
    # A progress bar would start a thread, and a process that forks has none but its own.
    tqdm.monitor_interval = 0
    scope = ShapeScope([SymbolRange(symbol=_TOKENS, low=1, high=64)])
    with contextlib.suppress(NoCompilerError, CompileError, OSError):
        call_inductor(_precompile_header, scope)
        generate(_product(), [_matrix(scope, _TOKENS), _matrix(scope, sympy.Integer(8))], scope)


def write_below(directory: Path) -> None:
    """From now on this process has Inductor write what it compiles below `directory`.

    Precompiled headers stay where every process finds them.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)


def limit_compilers(count: int) -> None:
    """From now on this process runs at most `count` C++ compilers at once."""
    config.compile_threads = min(count, get_compile_threads())


def _precompile_header() -> None:
    # Everything up to handing the kernel's compilation on, which is not run.
    CppPythonBindingsCodeCache.load_pybinding_async(["float*"], _KERNEL, submit_fn=_forget)


def _forget(task: Any) -> None:  # noqa: ARG001
    return None


def _product() -> fx.GraphModule:
    graph = fx.Graph()
    left, right = graph.placeholder("left"), graph.placeholder("right")
    graph.output((graph.call_function(torch.ops.aten.mm.default, (left, right)),))
    return fx.GraphModule({}, graph)


def _matrix(scope: ShapeScope, rows: sympy.Expr) -> torch.Tensor:
    eight, one = sympy.Integer(8), sympy.Integer(1)
    return scope.tensor((rows, eight), (eight, one), dtype=torch.float32, device="cpu")
