from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import vllmc.core


def test_these_names_are_public() -> None:
    assert vllmc.core.__all__ == [
        "CompileRange",
        "CompileSpec",
        "compiling",
        "ignore_torch_compile",
        "plainly",
        "support_torch_compile",
        "watch_recompiles",
    ]
    assert all(callable(getattr(vllmc.core, name)) for name in vllmc.core.__all__)


def test_no_module_has_a_public_name() -> None:
    """Else importing the module would put it in the place of the function."""
    modules = {module.name for module in pkgutil.iter_modules(vllmc.core.__path__)}
    assert modules.isdisjoint(vllmc.core.__all__)


def test_another_name_is_an_error_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match=r"'vllmc\.core' has no attribute 'watch'"):
        _ = vllmc.core.watch


def test_asking_for_a_name_and_watching_import_no_torch() -> None:
    program = """
import sys
from vllmc.core import watch_recompiles
with watch_recompiles() as report:
    pass
print(report.to_json(), "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == ("{'recompiles': [], 'graph_breaks': 0, 'first_compilations': 0} False\n")
