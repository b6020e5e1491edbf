"""Inductor, driven for one graph at a time, and what it generates taken apart.

Inductor's own serialised artifacts either lack the compiled C++ libraries or need Inductor, a
compiler and instruction-set probes to load (measured; see docs/pipeline.md). So the generated
wrapper is read here instead: a Python function over torch ops and compiled kernels, which
`vllmc.core.torch_compat.wrapper` reduces to what it needs at run time.
"""

from __future__ import annotations

import ast
import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import torch
import torch.fx as fx
from torch._dynamo.convert_frame import compile_lock
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch._inductor.ir import FlexibleLayout, get_fill_order
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.standalone_compile import AOTCompiledArtifact
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from vllmc.core.cache.trust import Trust, Untrusted
from vllmc.core.syntax import parse_module
from vllmc.core.torch_compat.cxx_calls import change_calls
from vllmc.core.torch_compat.minors import TORCH
from vllmc.core.torch_compat.shapes import ShapeScope

_same_ordered_by_number = FlexibleLayout.same_ordered


def _same_ordered(sizes: Sequence[Any], stride: Sequence[Any]) -> Sequence[Any]:
    """A contiguous stride in the order of `stride`, which may hold unbacked sizes.

    In the eyes of Inductor a tensor `[1, 1, T, D]` (the only key head of a model) lies channels
    last. To lay out another like it, torch 2.13 wants a number for each stride and gives up at
    `T`. What the order is decides nothing but speed. pytorch/pytorch#183840 is about the same.
    """
    try:
        return _same_ordered_by_number(sizes, stride)
    except GuardOnDataDependentSymNode:
        order = get_fill_order(stride, V.graph.sizevars.shape_env)
        return FlexibleLayout.fill_ordered(sizes, order)


# Once and for good: an exchange for the time of a compilation would meet those of other threads.
FlexibleLayout.same_ordered = staticmethod(_same_ordered)
change_calls()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A compiled C++ kernel: its name in the wrapper, and its library (an ELF shared object).

    `code` is Inductor's own digest of the kernel's source and of the compiler's command line.
    """

    name: str
    code: str
    library: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What Inductor generated for one graph.

    `constants` are tensors that it lifted out of the graph, by their name in the wrapper.
    """

    wrapper: str
    kernels: tuple[Kernel, ...]
    constants: tuple[tuple[str, torch.Tensor], ...]


class NoCompilerError(Exception):
    """Inductor needed a C++ compiler and found none."""


class CompileError(Exception):
    """The C++ compiler or Inductor refused the graph."""


def generate(module: fx.GraphModule, inputs: Sequence[object], scope: ShapeScope) -> Generated:
    """Compiles `module` for `inputs` (fake tensors of `scope`) on the CPU.

    Runs under the configuration in force: enter the overrides first. Raises `NoCompilerError`
    and `CompileError`.
    """
    outputs = len(module.graph.output_node().args[0])
    generated: list[Generated] = []

    def record(graph: fx.GraphModule, examples: Sequence[Any], **kwargs: Any) -> Any:
        # What stands around this graph otherwise (AOTAutograd's runtime wrappers) is not stored.
        _check_calling_convention(graph, len(inputs), outputs)
        result = compile_fx_inner(graph, examples, **kwargs)
        generated.append(
            _take_apart(result) if isinstance(result, CompiledFxGraph) else _without_calls(graph)
        )
        return result

    call_inductor(lambda: compile_fx(module, list(inputs), inner_compile=record), scope)
    (result,) = generated
    return result


def _check_calling_convention(graph: fx.GraphModule, inputs: int, outputs: int) -> None:
    placeholders = len(graph.graph.find_nodes(op="placeholder"))
    results = len(graph.graph.output_node().args[0])
    if (placeholders, results) != (inputs, outputs):
        raise CompileError(
            f"AOTAutograd made a graph of {placeholders} inputs and {results} outputs out of one "
            f"of {inputs} and {outputs}"
        )


def _take_apart(compiled: CompiledFxGraph) -> Generated:
    return Generated(
        wrapper=compiled.source_code,
        kernels=_kernels(compiled),
        constants=tuple(sorted((compiled.constants or {}).items())),
    )


def _without_calls(graph: fx.GraphModule) -> Generated:
    """A wrapper for a graph that only hands inputs on: Inductor makes none."""
    names = "".join(f"{node.name}, " for node in graph.graph.find_nodes(op="placeholder"))
    results = "".join(f"{result}, " for result in graph.graph.output_node().args[0])
    unpack = f"    ({names}) = args\n" if names else ""
    return Generated(
        wrapper=f"def call(args):\n{unpack}    args.clear()\n    return ({results})\n",
        kernels=(),
        constants=(),
    )


def generate_bundle(module: fx.GraphModule, inputs: Sequence[object], scope: ShapeScope) -> bytes:
    """Compiles `module` to Inductor's own serialised artifact, which holds its GPU binaries."""

    def compile_and_serialize() -> bytes:
        annotated = _with_example_values(module, inputs, scope)
        # AOTAutograd's cache makes what is serialised, and is otherwise off, as Inductor's, without
        # which it does nothing. Strict, it says why it passes over a graph.
        with (
            inductor_config.patch(fx_graph_cache=True),
            functorch_config.patch(enable_autograd_cache=True, strict_autograd_cache=True),
        ):
            artifact = TORCH.compile_bundle(annotated, inputs, scope.fake_mode)
        assert isinstance(artifact, AOTCompiledArtifact)
        return artifact.serialize()

    try:
        return call_inductor(compile_and_serialize, scope)
    except BypassAOTAutogradCache as error:
        raise CompileError(str(error)) from error


def _with_example_values(
    module: fx.GraphModule, inputs: Sequence[object], scope: ShapeScope
) -> fx.GraphModule:
    """A copy whose nodes tell that they are tensors, as AOTAutograd's cache wants to know."""

    class Annotate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                # A constant of the graph is no fake tensor yet.
                result = result if is_fake(result) else scope.fake_mode.from_tensor(result)
                n.meta["example_value"] = result
            return result

    copied = fx.GraphModule(module, copy.deepcopy(module.graph))
    with scope.fake_mode, scope.shape_env.ignore_fresh_unbacked_symbols():
        Annotate(copied).run(*inputs)
    return copied


def load_bundle(data: bytes) -> Callable[..., Sequence[object]]:
    """Loads what `generate_bundle` wrote. Unpickles: the caller has verified `data`.

    Raises `Untrusted` as `call_inductor` does.
    """
    _check_directory()
    return AOTCompiledArtifact.deserialize(data)


def bundle_code(data: bytes) -> bytes:
    """What was generated into a bundle, without what varies from one compilation to the next.

    That is the wrapper, with the source of each Triton kernel, less its comments, which number the
    process's compilations, and the constants that were lifted out of the graph. A bundle without
    a wrapper stands for itself. Unpickles: `data` comes from `generate_bundle`.
    """
    graph = _graph_of(data)
    if graph is None:
        return data
    parts = [ast.unparse(parse_module(graph.source_code)).encode()]
    for name, tensor in sorted((graph.constants or {}).items()):
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), bytes(values.numpy())]
    return b"\0".join(parts)


def bundle_source(data: bytes) -> str:
    """The wrapper in a bundle, with all its comments; empty where it has none. Unpickles."""
    graph = _graph_of(data)
    return graph.source_code if graph is not None else ""


def _graph_of(data: bytes) -> CompiledFxGraph | None:
    entry, *_ = pickle.loads(data)
    graph = getattr(getattr(entry, "compiled_fw", None), "result", None)
    return graph if isinstance(graph, CompiledFxGraph) and graph.source_code else None


def call_inductor(call: Callable[[], Any], scope: ShapeScope) -> Any:
    """Calls what calls Inductor. Raises `NoCompilerError` and `CompileError` for what it raises.

    Raises `Untrusted` where Inductor would run what another user may have put in its directory.
    """
    _check_directory()
    try:
        # AOTAutograd traces, and tracing patches modules for the whole process.
        with compile_lock, torch.no_grad(), tracing(TracingContext(scope.fake_mode)):
            return call()
    except InvalidCxxCompiler as error:
        raise NoCompilerError(str(error)) from error
    except CppCompileError as error:
        raise CompileError(str(error)) from error
    except InductorError as error:
        if isinstance(error.inner_exception, InvalidCxxCompiler):
            raise NoCompilerError(str(error.inner_exception)) from error
        raise CompileError(str(error)) from error
    except RuntimeError as error:
        # What AOTAutograd meets before Inductor (a data-dependent size, say) comes unwrapped.
        raise CompileError(str(error)) from error


def _check_directory() -> None:
    # What it finds there it runs, and below /tmp the name can be foretold. torch makes it as the
    # umask says, so that the group may write there says nothing.
    try:
        directory = Path(cache_dir())
        doubt = Trust().doubt_of_all(directory.stat())
    except OSError:
        return  # Inductor says what it cannot do.
    if doubt is not None:
        raise Untrusted(
            directory,
            f"{doubt}, and Inductor runs what it finds there",
            hint="export TORCHINDUCTOR_CACHE_DIR=DIR, a directory of your own",
        )


def _kernels(result: CompiledFxGraph) -> tuple[Kernel, ...]:
    module = next(m for m in reversed(PyCodeCache.modules) if m.key == result.cache_key)
    kernels = []
    for name, value in vars(module).items():
        owner = getattr(value, "__self__", None)
        library = getattr(owner, "__file__", None)
        # The module of a kernel is called `kernel`; that of a C++ wrapper is none.
        if isinstance(value, BuiltinFunctionType) and library and value.__name__ == "kernel":
            path = Path(library)
            code = path.name.partition(".")[0]
            kernels.append(Kernel(name=name, code=code, library=path.read_bytes()))
    return tuple(sorted(kernels, key=lambda k: k.name))
