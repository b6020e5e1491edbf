"""Dynamo's full-graph capture, with the facts about a graph that only Dynamo knows.

It is made by `torch._dynamo.convert_frame.fullgraph_capture`, in torch from 2.11.
"""

from __future__ import annotations

import builtins
import contextlib
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

import sympy
import torch
import torch._dynamo.convert_frame as convert_frame
import torch.fx as fx
from torch._dynamo import config as dynamo_config
from torch._dynamo.decorators import mark_dynamic, mark_unbacked
from torch._dynamo.exc import ObservedException, TorchDynamoException, TorchRuntimeError
from torch._dynamo.pgo import reset_code_state
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._guards import Guard
from torch._inductor import config as inductor_config
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from vllmc.core.spec import DynamicShapes
from vllmc.core.torch_compat.forward import positional_and_named
from vllmc.core.torch_compat.minors import TORCH
from vllmc.core.torch_compat.stand_ins import is_own_code, without_own

_GLOBAL = re.compile(r"\bG\['([^']+)'\]")
_LOCAL = re.compile(r"\bL\['([^']+)'\]")
_ARGUMENT = re.compile(r"\bL\['(?!self')")


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeGuard:
    """A condition on backed sizes that capture took for granted.

    `of_op` says that an op of torch asked for it, as for the strides of its result, and no branch
    of the model.
    """

    condition: sympy.Basic
    of_op: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RawCapture:
    """What Dynamo made of one call.

    `sources` maps each placeholder's name to the expression that Dynamo read it from
    (`L['self']._modules['model']._parameters['weight']`); `code` are the code objects traced;
    `guards` are the conditions on backed sizes under which the graph holds. `guarded` are the
    expressions of all Python values that the graph depends on, over `L['self']` (the module) and
    `M` (modules by name); `identities` are those of which it matters which object they are, and
    not only what. `replay(outputs)` does what the call does besides the graph: it is
    given what stands for the graph's outputs, and returns what the call returns.
    """

    module: fx.GraphModule
    sources: dict[str, str]
    code: tuple[CodeType, ...]
    guards: tuple[SizeGuard, ...]
    guarded: tuple[str, ...]
    identities: tuple[str, ...]
    replay: Callable[[Sequence[object]], object]


class CaptureError(Exception):
    """Dynamo could not capture one full graph. `frames` are the traced frames, outermost first."""

    def __init__(self, reason: str, frames: Sequence[traceback.FrameSummary]) -> None:
        super().__init__(reason)
        self.reason = reason
        self.frames = tuple(frames)


def mark_dimension(
    tensor: torch.Tensor, dim: int, *, kind: DynamicShapes, shape_id: str, low: int, high: int
) -> None:
    """Declares that `tensor.shape[dim]` varies between `low` and `high`.

    Dimensions marked with one `shape_id` share one unbacked symbol.
    """
    if kind == "unbacked":
        mark_unbacked(tensor, dim, shape_id=shape_id)
    else:
        mark_dynamic(tensor, dim, min=low, max=high)


@contextlib.contextmanager
def size_oblivious(kind: DynamicShapes) -> Iterator[None]:
    """Within it, backed sizes are not specialised on 0 and 1 if `kind` says so."""
    with symbolic_config.patch(backed_size_oblivious=kind == "backed-size-oblivious"):
        yield


def freezes_weights() -> bool:
    """Whether Inductor is to take parameters for constants, under the configuration in force."""
    return bool(inductor_config.freezing)


def capture_full_graph(
    module: torch.nn.Module, arguments: Mapping[str, object], kind: DynamicShapes
) -> RawCapture:
    """Traces `module(**arguments)` into one graph; numbers among the arguments are constants.

    Parameters may be fake; tensors in `arguments` must be real, with their dimensions marked,
    because marks on fake tensors are not seen. Raises `CaptureError` naming the frames in the way.
    """
    args, kwargs = positional_and_named(module, arguments)
    TORCH.before_fake_modes()
    # What earlier captures of the same code saw would decide which sizes are dynamic here.
    reset_code_state()
    try:
        with (
            # Tracing patches modules for the whole process: one thread at a time.
            convert_frame.compile_lock,
            torch.no_grad(),
            # Else a graph for sizes from 2 would be taken for one of 1, without a guard.
            size_oblivious("backed-size-oblivious" if kind == "backed" else kind),
            dynamo_config.patch(specialize_int=True, specialize_float=True),
            get_metrics_context(),
            dynamo_timed("fullgraph_capture"),
            TORCH.unguarded_reads() as unguarded,
        ):
            captured = convert_frame.fullgraph_capture(module.forward, args, kwargs)
    except TorchDynamoException as error:
        raise CaptureError(_reason(error), _frames(error)) from error
    backend_input = captured.backend_input
    if backend_input is None:
        raise CaptureError("the forward runs no tensor operation", ())
    graph_module = backend_input.graph_module
    return RawCapture(
        module=graph_module,
        sources={
            node.name: _source_name(node)
            for node in graph_module.graph.nodes
            if node.op == "placeholder"
        },
        code=tuple(c for c in captured.graph_capture_output.traced_code if not is_own_code(c)),
        guards=_guards(backend_input.fake_mode.shape_env),
        guarded=tuple(
            sorted(
                {
                    *without_own(_guarded(captured, unguarded, _closure(module.forward))),
                    *_methods(graph_module.graph),
                }
            )
        ),
        identities=tuple(
            sorted(
                {
                    guard.name
                    for guard in captured.graph_capture_output.output_graph.guards
                    if guard.create_fn_name() == "ID_MATCH"
                }
            )
        ),
        replay=lambda outputs: _replay(captured, module, arguments, outputs),
    )


def _replay(
    captured: convert_frame.CaptureOutput,
    module: torch.nn.Module,
    arguments: Mapping[str, object],
    outputs: Sequence[object],
) -> object:
    """Runs Dynamo's bytecode, which calls the graph and does the rest of what was traced."""
    known = captured.graph_capture_output.f_globals
    call = captured.forward_callable(
        compiled_fn=lambda *_: tuple(outputs),
        # Torch 2.11 and 2.12 want the builtins among them that the bytecode names.
        extra_globals={**vars(builtins), **known},
    )
    with torch.no_grad():
        args, kwargs = positional_and_named(module, arguments)
        return call(module, *args, **kwargs)


def _guards(shape_env: ShapeEnv | None) -> tuple[SizeGuard, ...]:
    if shape_env is None:
        return ()
    return tuple(
        SizeGuard(
            condition=shape_env.replace(guard.expr),
            # Dynamo asks for the model's Python, all other places in torch for an op.
            of_op="_dynamo/" not in str(guard.sloc.framework_loc),
        )
        for guard in shape_env.guards
    )


def _closure(forward: Any) -> Mapping[str, str]:
    """Expressions for the variables of functions around the forward, which Dynamo calls local."""
    code = getattr(forward, "__code__", None)
    return {
        name: f"L['self'].forward.__closure__[{index}].cell_contents"
        for index, name in enumerate(code.co_freevars if code else ())
    }


def _guarded(
    captured: convert_frame.CaptureOutput, unguarded: Iterable[str], closure: Mapping[str, str]
) -> Iterator[str]:
    output = captured.graph_capture_output
    for read in (*map(_guarded_expression, output.output_graph.guards), *unguarded):
        expression = _LOCAL.sub(lambda found: closure.get(found[1], found[0]), read)
        # What the graph is given is not what it depends on.
        if expression and not _ARGUMENT.search(expression):
            yield _GLOBAL.sub(lambda found: _global(found[1], output), expression)


def _global(name: str, output: convert_frame.GraphCaptureOutput) -> str:
    """What Dynamo calls a global of the function called first: it puts modules there itself."""
    if (module := output.import_sources.get(name)) is not None:
        return f"M[{module!r}]"
    value = output.f_globals.get(name)
    if value is vars(builtins):
        return "vars(M['builtins'])"
    if isinstance(value, ModuleType):
        return f"M[{value.__name__!r}]"
    return f"vars(M[{output.f_globals['__name__']!r}])[{name!r}]"


def _guarded_expression(guard: Guard) -> str:
    """What a guard looks at: the value of its source, unless it asks something else about it."""
    name = guard.name
    details = getattr(guard.create_fn, "keywords", {})
    match guard.create_fn_name():
        case "HASATTR":
            owner, attribute = TORCH.guarded_attribute(guard)
            return f"hasattr({owner}, {attribute!r})"
        case "NOT_PRESENT_IN_GENERIC_DICT":
            return f"{details['attr']!r} in vars({name})"
        case "DICT_CONTAINS" | "DICT_NOT_CONTAINS" if isinstance(details["key"], str):
            return f"{details['key']!r} in {name}"
        case "TYPE_MATCH" if name.endswith("'__dict__')"):
            return ""
        case "DUPLICATE_INPUT":
            return f"{name} is {details['source_b'].name}"
    return name


def _methods(graph: fx.Graph) -> Iterator[str]:
    """The methods of tensors in a graph: Dynamo does not ask whether others have replaced them."""
    for node in graph.find_nodes(op="call_method"):
        yield f"M['torch'].Tensor.{node.target}"


def _source_name(node: fx.Node) -> str:
    source: Any = getattr(node, "_dynamo_source", None)
    if source is None:
        source = node.meta["grapharg"].source
    return str(source.name)


def _reason(error: TorchDynamoException) -> str:
    """What stood in the way, in words; Dynamo's message holds advice to its developers besides."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, GuardOnDataDependentSymNode):
            return (
                "what it computes hangs on a number that is not known while it is captured: "
                f"{cause.cond}" + _meaning(cause.cond)
            )
    # From torch 2.14 an operation that fails is an exception that the model may catch.
    if isinstance(error, TorchRuntimeError):
        text = str(causes[-1]).replace("FakeTensor", "Tensor")
        return f"an operation fails: {type(causes[-1]).__name__}: {text}"
    for cause in causes:
        if isinstance(cause, ObservedException):
            return f"it raises {type(cause).__name__.removeprefix('Observed')}"
    if getattr(error, "gb_type", None) == "Data-dependent branching":
        return "it branches on the values of a tensor"
    return _first_paragraph(str(error)) or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _meaning(condition: object) -> str:
    """The first size that a forward reads is that of `input_ids`."""
    free = {str(symbol) for symbol in getattr(condition, "free_symbols", ())}
    return " (u0 is the number of tokens)" if "u0" in free else ""


def _first_paragraph(text: str) -> str:
    lines: list[str] = []
    for line in text.strip().splitlines():
        if lines and not line.strip():
            break
        if not line.strip().startswith("Hint:"):
            lines.append(line.strip())
    return " ".join(lines)


def _frames(error: TorchDynamoException) -> list[traceback.FrameSummary]:
    stack = getattr(error, "real_stack", None)
    return list(stack) if stack else []
