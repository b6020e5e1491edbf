"""The directions in which modules import each other, and what the quick paths leave alone.

    cli  ->  core  ->  kernels  ->  leaves

The leaves are what everything may import: `core.errors`, `core.spec` with `core.passes` and
`core.ranges`, `core.cache.key`, `core.cache.facts` with what tells whose files they are, and
`core.torch_compat`, which import each other only. Within core the order is between modules, not
packages (`graph.plan` makes units, which `compiler.protocol` describes by `graph.piece`): there is
no cycle.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAVES = (
    "vllmc.core.errors",
    "vllmc.core.passes",
    "vllmc.core.ranges",
    "vllmc.core.spec",
    "vllmc.core.syntax",
    "vllmc.core.cache.key",
    "vllmc.core.cache.facts",
    "vllmc.core.cache.files",
    "vllmc.core.cache.layout",
    "vllmc.core.cache.signing",
    "vllmc.core.cache.trust",
    "vllmc.core.cache.trust_store",
    "vllmc.core.torch_compat",
)
PRIVATE = ("torch._inductor", "torch._dynamo", "torch._functorch")


def _modules() -> dict[str, ast.Module]:
    found = {}
    for package in ("cli", "core", "kernels"):
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(("vllmc", *(part for part in parts if part != "__init__")))
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


MODULES = _modules()


def _imports(tree: ast.AST) -> Iterator[str]:
    """The modules of vllmc that some statement of `tree` imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module`, or a name of a module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        else:
            continue
        yield from (name for name in names if name.startswith("vllmc."))


def _below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _strays(importer: str, *allowed: str) -> list[tuple[str, str]]:
    """Imports by the modules below `importer` of anything but itself and what is `allowed`."""
    return [
        (name, imported)
        for name, tree in MODULES.items()
        if _below(name, importer)
        for imported in _imports(tree)
        if not _below(imported, importer, *allowed)
    ]


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 60
    assert "vllmc.core.pipeline" in _imports(MODULES["vllmc.cli.warm"])


def test_cli_imports_core_alone() -> None:
    assert _strays("vllmc.cli", "vllmc.core") == []


def test_core_imports_kernels_and_not_cli() -> None:
    assert _strays("vllmc.core", "vllmc.kernels") == []


def test_kernels_import_leaves_alone() -> None:
    assert _strays("vllmc.kernels", *LEAVES) == []


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_leaves_alone(leaf: str) -> None:
    assert _strays(leaf, *LEAVES) == []


def test_the_core_below_the_pipeline_does_not_know_it() -> None:
    above = ("vllmc.core.pipeline", "vllmc.core.obtain", "vllmc.core.prediction", "vllmc.core.job")
    packages = ("cache", "compiler", "diagnose", "graph", "models", "runtime")
    for package in packages:
        imported = {i for n in MODULES if _below(n, f"vllmc.core.{package}")
                    for i in _imports(MODULES[n])}  # fmt: skip
        assert not any(_below(name, *above) for name in imported), package


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        name: {
            imported
            for statement in tree.body
            if isinstance(statement, (ast.Import, ast.ImportFrom))
            for imported in _imports(statement)
        }
        for name, tree in MODULES.items()
    }
    # Raises CycleError.
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_private_torch_stands_in_torch_compat_alone() -> None:
    for name, tree in MODULES.items():
        if _below(name, "vllmc.core.torch_compat"):
            continue
        for node in ast.walk(tree):
            match node:
                case ast.Import(names=names):
                    assert not any(_below(a.name, *PRIVATE) for a in names), name
                case ast.ImportFrom(module=str(module), names=names):
                    found = [module, *(f"{module}.{alias.name}" for alias in names)]
                    assert not any(_below(f, *PRIVATE) for f in found), name
                case ast.Attribute(value=ast.Name(id="torch")):
                    assert f"torch.{node.attr}" not in PRIVATE, f"{name}:{node.lineno}"


CHOOSING = ("vllmc.core.torch_compat.minors", "vllmc.core.torch_compat.version")


def test_what_differs_between_torches_is_told_apart_in_one_place() -> None:
    """No version of torch is compared elsewhere, nor is torch asked what it happens to have."""
    for name, tree in MODULES.items():
        if _below(name, *CHOOSING):
            continue
        for node in ast.walk(tree):
            match node:
                case ast.Compare():
                    looked_at = [ast.unparse(node)]
                case ast.Call(func=ast.Attribute(attr="split" | "startswith" | "partition")):
                    looked_at = [ast.unparse(node.func)]
                case ast.Call(func=ast.Name(id="hasattr"), args=[first, *_]):
                    assert not ast.unparse(first).startswith("torch"), f"{name}:{node.lineno}"
                    continue
                case _:
                    continue
            assert not any("torch.__version__" in text for text in looked_at), (
                f"{name}:{node.lineno}"
            )


def _imported_by(*modules: str) -> set[str]:
    """What a fresh interpreter has loaded once it has imported `modules`."""
    script = "import importlib, sys\nfor m in sys.argv[1:]: importlib.import_module(m)\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}print(*sys.modules)", *modules],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_modules_that_say_so_import_no_torch() -> None:
    promised = [
        name
        for name, tree in MODULES.items()
        if "imports no torch" in " ".join((ast.get_docstring(tree) or "").lower().split())
    ]
    assert {"vllmc.core.cache.store", "vllmc.core.graph.layout", "vllmc.core.events"} <= set(
        promised
    )
    loaded = _imported_by(*promised)
    assert set(promised) <= loaded
    assert "torch" not in loaded


def test_the_command_line_imports_no_torch_before_it_must() -> None:
    commands = [name for name in MODULES if _below(name, "vllmc.cli")]
    loaded = _imported_by(*commands)
    assert "torch" not in loaded
    assert "transformers" not in loaded


def test_linking_and_running_import_no_compiler() -> None:
    # The whole of a warm hit but the model: Transformers itself imports Dynamo.
    loaded = _imported_by(
        "vllmc.core.pipeline",
        "vllmc.core.runtime.loader",
        "vllmc.core.runtime.program",
        "vllmc.core.runtime.engine",
        "vllmc.core.runtime.guards",
        "vllmc.core.runtime.workload",
        "vllmc.kernels.attention",
    )
    assert "torch" in loaded
    heavy = (
        "sympy",
        "torch._dynamo",
        "torch._functorch.aot_autograd",
        "torch._inductor",
        "torch.fx.experimental.symbolic_shapes",
        "transformers",
        "triton",
    )
    assert [name for name in heavy if name in loaded] == []
