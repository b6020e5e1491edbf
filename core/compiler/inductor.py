"""The `inductor` backend: machine code for one unit, in a form that needs no Inductor to run.

On the CPU an artifact holds the reduced wrapper and its kernels' shared objects
(`inductor-native`). On other devices it is Inductor's own bundle, which carries the GPU binaries
(`inductor-bundle`).
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.fx as fx

from vllmc.core.cache.key import canonical_json, sha256_hex
from vllmc.core.compiler.container import BUNDLE, NATIVE, pack
from vllmc.core.compiler.elf import loadable_part
from vllmc.core.compiler.protocol import (
    AFTER_TEXT,
    BEFORE_TEXT,
    CODE_TEXT,
    Compiled,
    Unit,
    example_inputs,
    example_scope,
)
from vllmc.core.errors import VllmcError
from vllmc.core.graph.passes.manager import passes_at, run_passes
from vllmc.core.graph.passes.report import PassReport
from vllmc.core.passes import PassChoice
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat import inductor
from vllmc.core.torch_compat.capture import size_oblivious
from vllmc.core.torch_compat.post_grad import at_post_grad, readable
from vllmc.core.torch_compat.wrapper import NotPortable, reduce_wrapper


class InductorCompiler:
    """Compiles with Inductor, under the configuration in force."""

    def compile(self, unit: Unit, spec: CompileSpec, *, texts: bool = False) -> Compiled:
        """With `texts`, the graph before and after the passes, and the code.

        Raises `VllmcError`: `no-compiler`, `compile-failed` or `range-not-covered`."""
        tokens = unit.range if unit.piece.depends_on_tokens else None
        passes = _Passes(passes_at("post-grad", spec.chosen_passes, tokens), texts=texts)
        with size_oblivious(spec.dynamic_shapes), passes.in_force():
            scope = example_scope(unit, spec)
            inputs = example_inputs(unit, scope)
            try:
                if torch.device(spec.device).type == "cpu":
                    generated = inductor.generate(unit.piece.module, inputs, scope)
                    compiled, code = _native(generated), generated.wrapper
                else:
                    data = inductor.generate_bundle(unit.piece.module, inputs, scope)
                    compiled = Compiled(
                        format=BUNDLE,
                        artifact=pack(BUNDLE, {}, {"bundle": data}),
                        code=sha256_hex(inductor.bundle_code(data)),
                    )
                    code = inductor.bundle_source(data)
            except inductor.NoCompilerError as error:
                raise VllmcError(
                    "no-compiler",
                    "something must be compiled, and there is no working C++ compiler",
                    context={"cause": str(error).strip().splitlines()[0]},
                    hint="install g++ or clang++, or warm the cache on a machine that has one",
                ) from error
            except inductor.CompileError as error:
                raise VllmcError(
                    "compile-failed",
                    f"Inductor could not compile a piece for the range {unit.range}",
                    context={"cause": str(error).strip()[:2000]},
                    hint="run again with -vv for the whole trace; --dynamic-shapes backed or "
                    "--compile-size N may compile it",
                ) from error
        _refuse_narrowed(unit, scope.narrowed())
        return replace(
            compiled,
            passes=tuple(passes.reports),
            texts=(*passes.texts, (CODE_TEXT, code)) if texts else (),
        )


class _Passes:
    """The passes of one unit: Inductor calls this with the graph. `texts` asks for its text."""

    def __init__(self, choices: tuple[PassChoice, ...], *, texts: bool) -> None:
        self._choices = choices
        self._wanted = texts
        self.reports: list[PassReport] = []
        self.texts: list[tuple[str, str]] = []

    def in_force(self) -> AbstractContextManager[None]:
        """Within it they are run over what Inductor compiles."""
        if not self._choices and not self._wanted:
            return nullcontext()
        return at_post_grad(self)

    def __call__(self, graph: fx.Graph) -> None:
        self._write(BEFORE_TEXT, graph)
        self.reports += run_passes(graph, self._choices)
        self._write(AFTER_TEXT, graph)

    def _write(self, name: str, graph: fx.Graph) -> None:
        if self._wanted:
            self.texts.append((name, readable(graph)))


def _native(generated: inductor.Generated) -> Compiled:
    constants = {name: _bytes(tensor) for name, tensor in generated.constants}
    names = frozenset([*(k.name for k in generated.kernels), *constants])
    try:
        reduced = reduce_wrapper(generated.wrapper, provided=names)
    except NotPortable as error:
        raise VllmcError(
            "compile-failed",
            "the generated code needs Inductor at run time, so it cannot be stored",
            context={"construct": error.construct},
            hint="leave out the -O option that asks for this code",
        ) from error
    kernels = [k for k in generated.kernels if k.name in reduced.provided]
    return Compiled(
        format=NATIVE,
        artifact=pack(
            NATIVE,
            {"provided": list(reduced.provided), "extern_kernels": dict(reduced.products)},
            {
                "wrapper.py": reduced.source.encode(),
                **{f"kernels/{k.name}.so": loadable_part(k.library) for k in kernels},
                **{f"constants/{n}": d for n, d in constants.items() if n in reduced.provided},
            },
        ),
        code=sha256_hex(
            canonical_json(
                {
                    "wrapper": reduced.source,
                    "extern_kernels": dict(reduced.products),
                    "kernels": {k.name: k.code for k in kernels},
                    "constants": {name: sha256_hex(data) for name, data in constants.items()},
                }
            )
        ),
    )


def _refuse_narrowed(unit: Unit, narrowed: list[str]) -> None:
    if not narrowed:
        return
    raise VllmcError(
        "range-not-covered",
        f"compiling for the range {unit.range} made code for a part of it only",
        context={"assumed": narrowed},
        hint="--dynamic-shapes unbacked makes no such assumptions",
    )


def _bytes(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()
