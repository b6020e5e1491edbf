from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vllmc.core.cache import key, record, sources
from vllmc.core.cache.record import NO_DIGEST

BLOCK = """
def attend(x):
    return x + 1

class Layer:
    def forward(self, x):
        return attend(x)
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports modules of a package `mymodels` (with `deep.layers`) and a module `mymodule`."""
    root = tmp_path / "site"
    (root / "mymodels" / "deep").mkdir(parents=True)
    (root / "mymodels" / "__init__.py").write_text("loads = []\n")
    (root / "mymodels" / "deep" / "__init__.py").write_text("")
    (root / "mymodels" / "deep" / "layers.py").write_text(BLOCK)
    (root / "mymodule.py").write_text(BLOCK)
    monkeypatch.syspath_prepend(root)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        del sys.modules[name]


def file_of(module: ModuleType) -> str:
    return module.attend.__code__.co_filename  # type: ignore[no-any-return]


def test_files_are_named_relative_to_their_top_level_package(
    load: Callable[[str], ModuleType],
) -> None:
    layers, single = load("mymodels.deep.layers"), load("mymodule")
    found = sources.collect(
        {file_of(layers): ["Layer.forward", "attend"], file_of(single): ["attend"]}
    )
    assert [(s.package, s.path, s.functions) for s in found] == [
        ("mymodels", "deep/layers.py", ("Layer.forward", "attend")),
        ("mymodule", "mymodule.py", ("attend",)),
    ]
    assert all(len(s.digest) == 32 for s in found)
    assert found[0].digest == found[1].digest
    assert sources.verify(found) == ()


def test_a_changed_file_is_stale_and_says_which_functions_it_held(
    load: Callable[[str], ModuleType],
) -> None:
    layers, single = load("mymodels.deep.layers"), load("mymodule")
    found = sources.collect({file_of(layers): ["Layer.forward"], file_of(single): ["attend"]})
    Path(file_of(layers)).write_text(BLOCK.replace("x + 1", "x + 2"))
    [stale] = sources.verify(found)
    assert (stale.path, stale.functions) == ("deep/layers.py", ("Layer.forward",))
    Path(file_of(layers)).write_text(BLOCK)
    assert sources.verify(found) == ()


def test_sources_are_shown_as_they_are_now(load: Callable[[str], ModuleType]) -> None:
    layers, single = load("mymodels.deep.layers"), load("mymodule")
    found = sources.collect({file_of(layers): ["Layer.forward"], file_of(single): ["attend"]})
    assert sources.current(found) == found
    Path(file_of(layers)).write_text("changed")
    Path(file_of(single)).unlink()
    [now] = sources.current(found)
    assert (now.path, now.functions) == ("deep/layers.py", ("Layer.forward",))
    assert now.digest != found[0].digest


def test_a_missing_file_and_a_missing_package_are_stale(
    load: Callable[[str], ModuleType],
) -> None:
    [source] = sources.collect({file_of(load("mymodels.deep.layers")): []})
    elsewhere = replace(source, package="no_such_package")
    Path(file_of(sys.modules["mymodels.deep.layers"])).unlink()
    assert sources.verify([source, elsewhere]) == (source, elsewhere)


def test_code_without_a_file_and_code_that_the_key_covers_is_left_out() -> None:
    covered = [torch.nn.Module.register_buffer, key.sha256_hex]
    files = {inspect.unwrap(function).__code__.co_filename: ["f"] for function in covered}
    assert all(Path(file).is_file() for file in files)
    nowhere = {"<string>": ["f"], "<frozen importlib._bootstrap>": ["g"], "<eval_with_key>.0": []}
    assert sources.collect({**files, **nowhere}) == ()


def test_the_standard_library_is_no_exception() -> None:
    [source] = sources.collect({json.dumps.__code__.co_filename: ["dumps"]})
    assert (source.package, source.path) == ("json", "__init__.py")
    assert sources.verify([source]) == ()


def test_a_file_of_a_package_that_is_no_module_of_it_belongs_to_the_package(
    load: Callable[[str], ModuleType],
) -> None:
    load("mymodels")
    template = Path(sys.modules["mymodels"].__path__[0]) / "templates" / "block.py"
    template.parent.mkdir()
    template.write_text(BLOCK)
    [source] = sources.collect({str(template): ["attend"]})
    assert (source.package, source.path) == ("mymodels", "templates/block.py")
    assert sources.verify([source]) == ()


def test_a_file_outside_every_package_never_verifies(tmp_path: Path) -> None:
    loose = tmp_path / "loose_model.py"
    loose.write_text(BLOCK)
    found = sources.collect({str(loose): ["attend"]})
    assert [(s.package, s.path) for s in found] == [("loose_model", "loose_model.py")]
    assert sources.verify(found) == found


def test_a_file_that_is_gone_before_it_is_read_never_verifies(
    load: Callable[[str], ModuleType],
) -> None:
    layers = load("mymodels.deep.layers")
    Path(file_of(layers)).unlink()
    [source] = sources.collect({file_of(layers): []})
    assert (source.package, source.path) == ("mymodels", "deep/layers.py")
    assert source.digest == NO_DIGEST
    assert sources.verify([source]) == (source,)


def test_a_file_that_changed_after_its_import_never_verifies(
    load: Callable[[str], ModuleType],
) -> None:
    """Saved while a program was compiled, its digest would stand for what was never traced."""
    file = file_of(load("mymodels.deep.layers"))
    changed = Path(file).stat().st_ctime
    [before] = sources.collect({file: []}, since=changed + 1)
    [after] = sources.collect({file: []}, since=changed)
    assert sources.verify([before, after]) == (after,)
    assert after.digest == NO_DIGEST


def run(cwd: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


VERIFY = """
import json, sys
from vllmc.core.cache.record import SourceFile
from vllmc.core.cache.sources import verify
rows = [SourceFile(**{**row, "functions": ()}) for row in json.loads(sys.argv[1])]
print(json.dumps([row.path for row in verify(rows)]))
print(sorted(name for name in sys.modules if name.startswith("mymodels") or name == "torch"))
"""


def test_another_place_verifies_without_importing_anything(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    [source] = sources.collect({file_of(load("mymodels.deep.layers")): []})
    (tmp_path / "site").rename(tmp_path / "moved")
    row = json.dumps([{"package": source.package, "path": source.path, "digest": source.digest}])
    place = str(tmp_path / "moved")
    assert run(tmp_path, "-c", VERIFY, row, PYTHONPATH=place).splitlines() == ["[]", "[]"]
    stale = run(tmp_path, "-c", VERIFY, row).splitlines()
    assert stale == ['["deep/layers.py"]', "[]"]


SCRIPT = """
import json
from vllmc.core.cache.sources import collect, verify

def attend(x):
    return x + 1

found = collect({attend.__code__.co_filename: ["attend"]})
print(json.dumps([[s.package, s.path, len(verify(found))] for s in found]))
"""


def test_a_script_is_main_and_a_module_run_by_name_is_its_package(tmp_path: Path) -> None:
    package = tmp_path / "apackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tool.py").write_text(SCRIPT)
    assert json.loads(run(tmp_path, "apackage/tool.py")) == [["__main__", "tool.py", 0]]
    assert json.loads(run(tmp_path, "-m", "apackage.tool")) == [["apackage", "tool.py", 0]]


@pytest.mark.parametrize("package", ["..", ".x", "a..b", "\0", "json"])
@pytest.mark.parametrize("path", ["x\0", "x" * 5000, "\ud800"])
def test_what_no_file_can_be_called_is_not_there(package, path):
    source = record.SourceFile(package=package, path=path, digest="1" * 32, functions=())
    assert sources.verify([source]) == (source,)
    assert sources.current([source]) == ()
