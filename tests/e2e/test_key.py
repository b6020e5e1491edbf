"""What must not change a key and what must, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vllmc.core

Run = Callable[..., Any]

PROGRAM = "from vllmc.cli.app import entry_point; entry_point()"


def installed_in(place: Path) -> dict[str, str]:
    """Another virtual environment, as an import path: copies of vllmc, links to the others."""
    packages = place / "lib" / "site-packages"
    packages.mkdir(parents=True)
    for entry in Path(torch.__file__).parents[1].iterdir():
        if entry.suffix != ".pth" and not entry.name.startswith("__editable__"):
            (packages / entry.name).symlink_to(entry)
    for name in ("core", "cli", "kernels"):
        source = Path(vllmc.core.__path__[0]).resolve().parent / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, packages / "vllmc" / name, ignore=ignored)
    return {"PYTHONPATH": str(packages)}


def another_user(place: Path) -> dict[str, str]:
    """Surroundings that must not matter, all of them other than those of the test."""
    return {
        "HOME": str(place / "home"),
        "USER": "somebody",
        "LOGNAME": "somebody",
        "HOSTNAME": "pod-7f9c",
        "POD_IP": "10.1.2.3",
        "CI": "true",
        "LANG": "de_DE.UTF-8",
        "LC_ALL": "C",
        "TZ": "Asia/Tokyo",
        "TERM": "dumb",
        "COLUMNS": "40",
        "NO_COLOR": "1",
        "PYTHONHASHSEED": "12345",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(place / "tmp"),
        "XDG_CACHE_HOME": str(place / "xdg-cache"),
        "XDG_CONFIG_HOME": str(place / "xdg-config"),
        "HF_HOME": str(place / "hf"),
        "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
        "TRITON_CACHE_DIR": str(place / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "TORCH_LOGS_OUT": str(place / "log"),
        "CXX": "no-such-compiler",
    }


def in_process(*words: str | Path, cwd: Path, **environment: str) -> Any:
    """The JSON that a command prints in a process with this environment."""
    cwd.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words), "--json"],
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def reordered(llama_dir: Path, tmp_path: Path) -> Path:
    """The same model in another directory, its configuration written in another order."""
    copy = tmp_path / "elsewhere" / "another-name"
    shutil.copytree(llama_dir, copy)
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(dict(reversed(fields.items()))))
    return copy


def test_neither_key_changes_with_user_place_process_or_order(
    llama_dir: Path, reordered: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for name in ("home", "tmp"):
        (there / name).mkdir(parents=True)
    imports = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    plain = {
        **imports,
        "HOME": str(here),
        "PYTHONHASHSEED": "0",
        "VLLMC_CACHE_DIR": str(here / "c"),
    }
    other = {**another_user(there), **installed_in(there), "VLLMC_CACHE_DIR": str(there / "c")}
    eager = ("--backend", "eager")

    mine = in_process("inspect-key", llama_dir, *eager, cwd=here, **plain)
    theirs = in_process("inspect-key", reordered, *eager, cwd=there / "work", **other)
    factors = [
        {(f["group"], f["name"]): f["value"] for f in row["factors"] if f["affects_key"]}
        for row in (mine, theirs)
    ]
    assert factors[0] == factors[1]
    assert mine["key"] == theirs["key"]
    for place in (str(tmp_path), str(Path(torch.__file__).parent), "somebody", "10.1.2.3"):
        assert place not in json.dumps([mine["factors"], theirs["factors"]])

    one = in_process("warm", llama_dir, *eager, cwd=here, **plain)
    two = in_process("warm", reordered, *eager, cwd=there / "work", **other)
    assert one["key"] == two["key"] == mine["key"]
    assert [u["artifact"] for u in one["units"]] == [u["artifact"] for u in two["units"]]
    assert unit_keys(here / "c") == unit_keys(there / "c") != set()
    # And what one of them stored, sources and guarded values included, the other finds.
    moved = {**other, "VLLMC_CACHE_DIR": str(here / "c")}
    found = in_process("warm", reordered, *eager, cwd=there / "work", **moved)
    assert (found["outcome"], found["program"]) == ("hit", "hit")


def unit_keys(cache: Path) -> set[str]:
    return {p.stem for p in (cache / "v1" / "units").rglob("*") if p.is_file()}


def test_a_changed_source_is_named_with_its_path_and_the_functions_traced(
    factory: Path, spawn: Run
) -> None:
    factory.write_text(
        factory.read_text()
        + "\n\nclass Small(LlamaForCausalLM):\n"
        + "    def __init__(self):\n        super().__init__(config())\n\n"
        + "    def forward(self, *args, **kwargs):\n"
        + "        return twice(super().forward(*args, **kwargs))\n\n\n"
        + "def twice(out):\n    out.logits = out.logits * 2\n    return out\n"
    )
    words = ("factory:Small", "--backend", "eager", "--json")
    assert spawn("warm", *words).code == 0
    factory.write_text(factory.read_text().replace("out.logits * 2", "out.logits * 3"))
    done = spawn("warm", "--check", *words)
    assert done.code == 3
    [change] = done.json["miss"]["changes"]
    assert (change["group"], change["name"]) == ("sources", "factory/factory.py")
    assert change["note"] == "factory/factory.py; traced in it: Small.forward, twice"
    assert "factory.py" in spawn("warm", "--check", *words[:-1]).out


def test_each_kind_of_origin_shows_from_a_shell(workplace: Path, spawn: Run) -> None:
    (workplace / "vllmc.toml").write_text(
        'dtype = "bfloat16"\n\n[inductor]\nepilogue_fusion = false\n'
    )
    done = spawn(
        "inspect-key",
        "--json",
        "-O",
        "dce=true",
        "--compile-size=4",
        env={
            "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
            "TORCHINDUCTOR_DEBUG_COMPILE": "0",
            "VLLMC_BACKEND": "eager",
        },
    )
    origins = {(f["group"], f["name"]): f["origin"] for f in done.json["factors"]}
    for identity, origin in {
        ("inductor", "max_autotune_gemm_backends"): "default",
        ("inductor", "dce"): "flag",
        ("spec", "sizes"): "flag",
        ("inductor", "cpp.threads"): "vllmc",
        ("inductor", "epilogue_fusion"): "file:vllmc.toml:4",
        ("spec", "dtype"): "file:vllmc.toml:1",
        ("inductor", "max_autotune"): "env:TORCHINDUCTOR_MAX_AUTOTUNE",
        ("environment", "TORCHINDUCTOR_DEBUG_COMPILE"): "env:TORCHINDUCTOR_DEBUG_COMPILE",
        ("spec", "backend"): "env:VLLMC_BACKEND",
        ("versions", "torch"): "probe",
        ("system", "cpu_capability"): "probe",
    }.items():
        assert origins[identity] == origin, identity
