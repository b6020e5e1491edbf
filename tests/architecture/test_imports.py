"""Imports run one way, private torch API lies in one place, and some commands do without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cli", "core", "kernels")

# What each part may import of vllmc, the longest name first. What a part may not import at run
# time it may not import for its types either.
ALLOWED = {
    "core.torch_compat": ("core.torch_compat", "core.errors", "core.spec", "core.cache.key"),
    "kernels": ("kernels", "core.torch_compat", "core.errors"),
    "core": ("core", "kernels"),
    "cli": ("cli", "core"),
}

TORCH_FREE = (
    "vllmc.cli.app",
    "vllmc.core.cache.explain",
    "vllmc.core.cache.record",
    "vllmc.core.cache.sources",
    "vllmc.core.cache.store",
    "vllmc.core.compiler.container",
    "vllmc.core.diagnose.recompiles",
    "vllmc.core.events",
    "vllmc.core.graph.layout",
    "vllmc.core.models.presets",
    "vllmc.core.spec",
)


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lies_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def test_imports_run_from_cli_to_core_to_kernels_to_the_leaves() -> None:
    wrong = []
    for name, module in modules():
        part = next(part for part in ALLOWED if lies_in(name, part))
        for target in imported(module):
            if target.startswith("vllmc.") and not any(
                lies_in(target.removeprefix("vllmc."), allowed) for allowed in ALLOWED[part]
            ):
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_private_torch_api_is_imported_in_torch_compat_only() -> None:
    private = ("torch._inductor", "torch._dynamo", "torch._functorch", "torch._subclasses")
    wrong = [
        f"{name} imports {target}"
        for name, module in modules()
        if not lies_in(name, "core.torch_compat")
        for target in imported(module)
        if any(lies_in(target, api) for api in private)
    ]
    assert wrong == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_needs_no_torch_does_not_import_it(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_linking_imports_neither_inductor_nor_sympy() -> None:
    program = (
        "import sys, vllmc.core.runtime.loader, vllmc.core.runtime.program, vllmc.core.obtain;"
        "heavy = {'torch._inductor.lowering', 'torch._dynamo.symbolic_convert', 'sympy'};"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
