"""The `eager` backend: a piece's own graph is its artifact. Quick, for tests and debugging."""

from __future__ import annotations

from types import ModuleType

from vllmc.core.cache.key import JsonValue, canonical_json, sha256_hex
from vllmc.core.compiler.container import EAGER, pack
from vllmc.core.compiler.protocol import CODE_TEXT, Compiled, Unit
from vllmc.core.graph.targets import import_path
from vllmc.core.spec import CompileSpec


class EagerCompiler:
    """Writes the piece's graph as Python source."""

    def compile(self, unit: Unit, spec: CompileSpec, *, texts: bool = False) -> Compiled:  # noqa: ARG002
        """Never fails: there is nothing to compile."""
        code = unit.piece.graph.python_code("self")
        imports: dict[str, JsonValue] = {
            name: _import_path(value) for name, value in sorted(code.globals.items())
        }
        source = code.src.encode()
        return Compiled(
            format=EAGER,
            artifact=pack(EAGER, {"imports": imports}, {"graph.py": source}),
            code=sha256_hex(canonical_json({"source": code.src, "imports": imports})),
            texts=((CODE_TEXT, code.src),) if texts else (),
        )


def _import_path(value: object) -> JsonValue:
    if isinstance(value, ModuleType):
        return [value.__name__, ""]
    if isinstance(value, float):
        # The names `inf` and `nan`; a sign stands before them in the source.
        return ["math", repr(value).lstrip("-")]
    if value is type(None):
        return ["types", "NoneType"]
    return list(import_path(value))
