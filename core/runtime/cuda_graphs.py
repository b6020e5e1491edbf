"""Piecewise CUDA graphs: the pieces of small steps are recorded once and then replayed.

A graph launches all kernels of a piece at once, which is what a decode step spends its time on. It
holds addresses and sizes. So a piece is recorded for each size, and reads its inputs where they
were then: a call's arguments are copied there, the results of recorded pieces are there already.
Splitting ops run between the graphs as ever. After vLLM's piecewise graphs (vllm/compilation),
but recorded lazily and never padded: a row more is not without effect where something looks at all
rows, as the scale of a dynamic quantisation does.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

import torch

from vllmc.core.graph.layout import Layout
from vllmc.core.runtime.linked import Linked, Step, Unit
from vllmc.core.runtime.loader import BoundPiece
from vllmc.core.torch_compat.cuda_capture import end_capture
from vllmc.kernels.forward_context import ForwardContext, forward_context, running_context

DEFAULT_SIZES: Final = (*range(1, 9), *range(16, 65, 8))
"""The numbers of tokens that are recorded: each up to 8, then every eighth up to 64."""

PLAIN_STEPS: Final = 3
"""How many steps of a size run before it is recorded.

Recording costs about as much as a few steps, which a size that does not come again would waste.
"""


class RecordingFailed(Exception):
    """A piece does something that no graph can hold; the text says what."""


class Recorder(Protocol):
    """Records calls."""

    def record(
        self, run: Callable[[], Sequence[Any]]
    ) -> tuple[Sequence[Any], Callable[[], object]]:
        """What `run` returns, and a function that computes it anew, in the same memory.

        The results hold nothing before that is called. Raises `RecordingFailed`.
        """

    def used_bytes(self) -> int:
        """The memory that is in use on the device: the growth over a recording is its own."""


class CudaRecorder:
    """Records CUDA graphs on `device`, which share a memory pool.

    Torch takes no more graphs into a pool that all graphs have left, or where a capture failed: the
    next ones have another.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()
        self._in_pool: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def record(
        self, run: Callable[[], Sequence[Any]]
    ) -> tuple[Sequence[Any], Callable[[], object]]:
        """As `Recorder.record`, by a capture of the current device's work."""
        graph = torch.cuda.CUDAGraph()
        if not self._in_pool:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                # The outer block gives the stream back where the end of a capture fails, too.
                with torch.cuda.stream(self._stream):
                    # Libraries and kernels that are loaded when first called are loaded here.
                    run()
                    with torch.cuda.graph(
                        graph,
                        pool=self._pool,
                        stream=self._stream,
                        capture_error_mode="thread_local",
                    ):
                        results = run()
            except RuntimeError as error:
                end_capture(torch.cuda.current_device(), self._pool)
                self._in_pool.clear()
                # Torch asks it, when it next pins memory, whether it still captures.
                self._failed.append(graph)
                # The end of the capture fails as well, and knows no cause.
                cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
                first, *_ = str(cause).strip().splitlines() or [type(cause).__name__]
                raise RecordingFailed(first) from error
            finally:
                current.wait_stream(self._stream)
        self._in_pool.add(graph)
        return results, graph.replay

    def used_bytes(self) -> int:
        """As `Recorder.used_bytes`: what graphs take outside of torch's allocator is counted."""
        # A capture gives back what is only cached, which would hide what the graph takes.
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphReport:
    """What was recorded: for which `sizes`, how many graphs, in how much memory.

    `replayed` counts the steps that ran by graphs, `plain` says of the pieces that cannot be
    recorded why not, by name, and `failed` of those that turned out not to be.
    """

    sizes: tuple[int, ...]
    graphs: int
    replayed: int
    bytes: int
    plain: Mapping[str, str]
    failed: Mapping[str, str]


def is_recorded(sizes: Sequence[int], wanted: frozenset[int]) -> bool:
    """Whether a step of these `sizes` is a decode step, all of them its tokens, of a wanted one."""
    return bool(sizes) and sizes[0] in wanted and all(size == sizes[0] for size in sizes)


class CudaGraphs:
    """The recorded steps of one program, for numbers of tokens in `sizes`.

    Graphs hold the addresses of the caches and experts that were in the forward context: those of
    another engine make all of them anew.
    """

    def __init__(
        self, layout: Layout, recorder: Recorder, sizes: Iterable[int] = DEFAULT_SIZES
    ) -> None:
        self.recorder = recorder
        self._layout = layout
        self._sizes = frozenset(sizes)
        self._plain = {o.piece: o.cause for o in layout.obstacles}
        if layout.written:
            # What a graph writes to is its copy of an argument.
            self._plain = dict.fromkeys(
                range(len(layout.pieces)), "the program writes to arguments"
            )
        self._failed: dict[int, str] = {}
        self._seen: Counter[int] = Counter()
        self._steps: dict[int, _RecordedStep] = {}
        self._memory: dict[int, torch.Tensor] = {}
        self._context: ForwardContext | None = None
        self._replayed = 0
        self._bytes = 0

    def step(self, sizes: Sequence[int], linked: Linked) -> Step:
        """What to run for a call of these sizes: the step of `linked`, or one with graphs in it."""
        if not is_recorded(sizes, self._sizes):
            return linked.step
        size = sizes[0]
        self._seen[size] += 1
        if self._seen[size] <= PLAIN_STEPS or not self._may_record(linked):
            return linked.step
        self._forget_others()
        recorded = self._steps.get(size)
        if recorded is None:
            # Not in a circle, which would hold weights and caches until it is collected.
            recorded = self._steps[size] = _RecordedStep(weakref.proxy(self), linked)
            return partial(self._measured, recorded)
        self._replayed += 1
        return recorded

    def report(self) -> GraphReport:
        """What has been recorded so far."""
        names = self._layout.pieces
        return GraphReport(
            sizes=tuple(sorted(size for size, step in self._steps.items() if step.graphs)),
            graphs=sum(step.graphs for step in self._steps.values()),
            replayed=self._replayed,
            bytes=self._bytes,
            plain={names[piece]: cause for piece, cause in sorted(self._plain.items())},
            failed={names[piece]: cause for piece, cause in sorted(self._failed.items())},
        )

    def records(self, piece: int) -> bool:
        """Whether a piece is recorded, as far as is known."""
        return piece not in self._plain and piece not in self._failed

    def failed(self, piece: int, cause: str) -> None:
        """The piece could not be recorded: it is not tried again."""
        self._failed[piece] = cause

    def place_for(self, number: int, given: torch.Tensor) -> torch.Tensor:
        """Where graphs read argument `number` of a step of the size of `given`.

        Steps of all sizes share the memory, which is that of the largest: only one runs at a time.
        """
        shape = self._layout.arguments[number].shape
        most = 1
        for size in shape:
            most *= size if isinstance(size, int) else max(self._sizes)
        if number not in self._memory:
            self._memory[number] = torch.empty(most, dtype=given.dtype, device=given.device)
        return self._memory[number][: given.numel()].view(given.shape)

    def _may_record(self, linked: Linked) -> bool:
        return any(self.records(unit.piece) for unit in linked.units.values())

    def _forget_others(self) -> None:
        """Drops what was recorded with other caches or experts than those there are now."""
        now, then = running_context(), self._context
        if now is None or then is None:
            same = now is then
        else:
            same = _same(now.caches, then.caches) and _same(now.experts, then.experts)
        if not same:
            self._steps.clear()
            self._bytes = 0
            self._context = now

    def _measured(self, recorded: _RecordedStep, *arguments: torch.Tensor) -> Any:
        before = self.recorder.used_bytes()
        result = recorded(*arguments)
        self._bytes += max(0, self.recorder.used_bytes() - before)
        return result


def _same(a: Mapping[str, object], b: Mapping[str, object]) -> bool:
    """Whether both hold the very same objects."""
    return a is b or (a.keys() == b.keys() and all(a[layer] is b[layer] for layer in a))


class _RecordedStep:
    """A step of one size, whose units are recorded in its first call."""

    def __init__(self, graphs: CudaGraphs, linked: Linked) -> None:
        self._graphs = graphs
        # By identity: tensors that are at their place in every call of this step.
        self.held: dict[int, torch.Tensor] = {}
        self._units = {
            name: _RecordedUnit(unit, graphs, self.held)
            for name, unit in linked.units.items()
            if graphs.records(unit.piece)
        }
        calls = {name: unit.call for name, unit in linked.units.items()}
        self._step = linked.rebind(calls | self._units)
        self._arguments: list[torch.Tensor] | None = None
        self._slots: torch.Tensor | None = None

    @property
    def graphs(self) -> int:
        """How many units are recorded."""
        return sum(unit.is_recorded for unit in self._units.values())

    def __call__(self, *arguments: torch.Tensor) -> Any:
        if self._arguments is None:
            self._arguments = [self._graphs.place_for(i, a) for i, a in enumerate(arguments)]
            self.held |= {id(tensor): tensor for tensor in self._arguments}
        for place, given in zip(self._arguments, arguments, strict=True):
            place.copy_(given)
        context = running_context()
        if context is None:
            return self._step(*self._arguments)
        # Ops inside pieces read the slots too, where keys and values are stored there.
        if self._slots is None:
            self._slots = torch.empty_like(context.metadata.slots)
        self._slots.copy_(context.metadata.slots)
        metadata = replace(context.metadata, slots=self._slots)
        with forward_context(replace(context, metadata=metadata)):
            return self._step(*self._arguments)


class _RecordedUnit:
    """A unit of one size: recorded in its first call, then replayed; or run as ever, if it fails.

    Its inputs are copied to where they were in that call, but for those that are `held` there.
    """

    def __init__(self, unit: Unit, graphs: CudaGraphs, held: dict[int, torch.Tensor]) -> None:
        self._unit = unit
        self._graphs = graphs
        self._held = held
        self._call: BoundPiece = self._first
        self.is_recorded = False

    def __call__(self, *given: object) -> Sequence[Any]:
        return self._call(*given)

    def _first(self, *given: object) -> Sequence[Any]:
        if not self._graphs.records(self._unit.piece):
            # Another layer's piece was the same program, and failed.
            self._call = self._unit.call
            return self._call(*given)
        try:
            places = [self._place(value) for value in given]
            results, replay = self._graphs.recorder.record(partial(self._unit.call, *places))
        except RecordingFailed as error:
            self._graphs.failed(self._unit.piece, str(error))
            self._call = self._unit.call
            return self._call(*given)
        self.is_recorded = True
        self._held |= {id(value): value for value in results if isinstance(value, torch.Tensor)}
        tensors = [(i, place) for i, place in enumerate(places) if isinstance(place, torch.Tensor)]

        def call(*given: object) -> Sequence[Any]:
            for index, place in tensors:
                value = given[index]
                if value is not place:
                    place.copy_(value)
            replay()
            return results

        self._call = call
        return call(*given)

    def _place(self, value: object) -> object:
        if not isinstance(value, torch.Tensor) or id(value) in self._held:
            return value
        place = value.new_empty_strided(value.shape, value.stride())
        try:
            return place.copy_(value)
        except RuntimeError as error:
            raise RecordingFailed("elements of what it is given share memory") from error


def recorder_for(device: str) -> Recorder | None:
    """What records on `device`; None where there are no CUDA graphs."""
    return CudaRecorder(device) if torch.device(device).type == "cuda" else None
