"""torch 2.12."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllmc.core.torch_compat.minors.torch_2_13 import Torch213

if TYPE_CHECKING:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode


class Torch212(Torch213):
    """Inductor's own artifacts are not told a fake mode, and some options are not there yet."""

    absent = Torch213.absent | {
        ("inductor", "aot_inductor.enable_line_tables"),
        ("inductor", "cpp.march"),
        ("inductor", "compile_worker_wait_timeout"),
        ("inductor", "trace.graph_diagram_format"),
        ("inductor", "trace.orig_fx_graph_diagram_format"),
        ("dynamo", "compiler.dynamic_values"),
        ("dynamo", "inline_single_use_invoke_subgraph"),
        ("dynamo", "symbolic_shapes.unify_view_symbols_bso_meta"),
    }

    def compile_bundle(
        self,
        module: torch.fx.GraphModule,
        inputs: Sequence[object],
        fake_mode: FakeTensorMode,  # noqa: ARG002 - that of the tracing context
    ) -> Any:
        """See `Newest`."""
        from torch._inductor.standalone_compile import standalone_compile

        # Told to look at the inputs, it would make a mode of its own, which does not know theirs.
        return standalone_compile(
            module, list(inputs), dynamic_shapes="from_tracing_context", options={}, aot=True
        )
