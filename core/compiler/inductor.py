"""The `inductor` backend: machine code for one unit, in a form that needs no Inductor to run.

On the CPU an artifact holds the reduced wrapper and its kernels' shared objects
(`inductor-native`). On other devices it is Inductor's own bundle, which carries the GPU binaries
(`inductor-bundle`).
"""

from __future__ import annotations

import io

import torch

from vllmc.core.cache.key import canonical_json, sha256_hex
from vllmc.core.compiler.container import BUNDLE, NATIVE, pack
from vllmc.core.compiler.elf import loadable_part
from vllmc.core.compiler.protocol import Compiled, Unit, example_inputs, example_scope
from vllmc.core.errors import VllmcError
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat import inductor
from vllmc.core.torch_compat.capture import size_oblivious
from vllmc.core.torch_compat.wrapper import NotPortable, reduce_wrapper


class InductorCompiler:
    """Compiles with Inductor, under the configuration in force."""

    def compile(self, unit: Unit, spec: CompileSpec) -> Compiled:
        """Raises `VllmcError`: `no-compiler`, `compile-failed` or `range-not-covered`."""
        with size_oblivious(spec.dynamic_shapes):
            scope = example_scope(unit, spec)
            inputs = example_inputs(unit, scope)
            try:
                if torch.device(spec.device).type == "cpu":
                    compiled = _native(inductor.generate(unit.piece.module, inputs, scope))
                else:
                    data = inductor.generate_bundle(unit.piece.module, inputs, scope)
                    compiled = Compiled(
                        format=BUNDLE,
                        artifact=pack(BUNDLE, {}, {"bundle": data}),
                        code=sha256_hex(inductor.bundle_code(data)),
                    )
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
        return compiled


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
