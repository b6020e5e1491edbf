"""Declared classes: warmed by the command, then called in a process that may not compile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

MODEL = """
from __future__ import annotations
import torch
from torch import Tensor
from vllmc.core import support_torch_compile

@support_torch_compile(dynamic_arg_dims={"ids": {0: "tokens"}, "positions": {0: "tokens"}})
class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(32, 8)
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, ids: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.linear(self.embed(ids)) * positions[:, None]

@support_torch_compile(
    dynamic_arg_dims={"held": {0: "rows"}},
    example_inputs=lambda module: {"held": {"x": torch.zeros(4, 3, 2)}, "how": "twice"},
)
class Given(torch.nn.Module):
    def forward(self, held: dict[str, Tensor], how: str = "once") -> Tensor:
        return held["x"].sum(2) * (2 if how == "twice" else 1)

@support_torch_compile(dynamic_arg_dims={"x": 0})
class Odd(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 7, 3)

@support_torch_compile(dynamic_arg_dims={"x": 0}, example_inputs=lambda module: {"y": 1})
class Misnamed(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x
"""

CALLS = {
    "Decoder": "(torch.arange(n) % 32, torch.arange(n))",
    "Given": "({'x': torch.randn(n, 3, 2)}, 'twice')",
}

PROGRAM = """
import sys
import torch
import declared
from vllmc.core import CompileRange, CompileSpec, compiling, plainly

name, backend, dtype, kind, *sizes = sys.argv[1:]
ranges = (CompileRange(1, 1),) if sizes == ["1"] else (CompileRange(1, 8192),)
spec = CompileSpec(
    device="auto", dtype="auto", backend=backend, dynamic_shapes=kind, ranges=ranges
)
with compiling(spec, may_compile=False):
    model = getattr(declared, name)().eval().to(getattr(torch, dtype))
for n in map(int, sizes):
    call = {call}
    with torch.no_grad(), plainly():
        expected = model(*call)
    torch.testing.assert_close(model(*call), expected)
print("equal")
"""


@pytest.fixture
def module(workplace: Path) -> Path:
    path = workplace / "declared.py"
    path.write_text(MODEL)
    return path


@pytest.fixture
def call(module: Path, cache: Path) -> Run:
    """Runs a declared class, compared with its plain forward, in a process that only looks up."""

    def run(
        name: str, *sizes: int, backend: str = "eager", dtype: str = "float32", kind: str = ""
    ) -> subprocess.CompletedProcess[str]:
        program = PROGRAM.replace("{call}", CALLS[name])
        words = [name, backend, dtype, kind or "unbacked", *map(str, sizes)]
        return subprocess.run(
            [sys.executable, "-c", program, *words],
            env=os.environ | {"VLLMC_CACHE_DIR": str(cache)},
            cwd=module.parent,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


@pytest.mark.slow
def test_what_warm_compiled_with_inductor_runs_where_nothing_may_be_compiled(
    call: Run, vllmc: Run
) -> None:
    refused = call("Decoder", 3, backend="inductor")
    assert "would-miss" in refused.stderr
    assert vllmc("warm", "declared:Decoder", "--json").json["outcome"] == "compiled"
    check(call("Decoder", 1, 7, 300, backend="inductor"))


def test_the_check_predicts_what_a_process_then_finds(
    module: Path, call: Run, eager: Run, forget: Run
) -> None:
    words = ("warm", "declared:Decoder", "--json")
    before = eager(*words, "--check")
    assert (before.code, before.json["outcome"]) == (3, "would-miss")
    warmed = eager(*words).json
    after = eager(*words, "--check")
    assert (after.code, after.json["outcome"]) == (0, "would-hit")
    assert after.json["key"] == warmed["key"]
    check(call("Decoder", 1, 5))
    module.write_text(MODEL.replace("positions[:, None]", "positions[:, None] + 1"))
    forget(module.parent)
    changed = eager(*words, "--check")
    assert changed.code == 3
    assert "class declared.Decoder" in str(changed.json["miss"])
    assert "would-miss" in call("Decoder", 5).stderr


def test_example_inputs_say_what_the_call_is(call: Run, eager: Run) -> None:
    assert eager("warm", "declared:Given", "--json").json["outcome"] == "compiled"
    check(call("Given", 1, 5))


@pytest.mark.parametrize(
    "kind", ["backed", pytest.param("backed-size-oblivious", marks=pytest.mark.thorough)]
)
def test_a_program_is_of_the_kind_that_was_asked_for(kind: str, call: Run, eager: Run) -> None:
    assert eager("warm", "declared:Decoder", "--dynamic-shapes", kind).code == 0
    check(call("Decoder", 1, 5, kind=kind))
    assert "would-miss" in call("Decoder", 5).stderr


def test_a_range_of_one_token_is_a_program_of_its_own(call: Run, eager: Run) -> None:
    assert eager("warm", "declared:Decoder", "--compile-range", "1:1").code == 0
    check(call("Decoder", 1))


def test_the_dtype_is_that_of_the_module_when_it_is_called(call: Run, eager: Run) -> None:
    assert eager("warm", "declared:Decoder", "--dtype", "bfloat16").code == 0
    check(call("Decoder", 3, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("name", "says"),
    [("Odd", "can be guessed from neither"), ("Misnamed", "are not those of its forward")],
)
def test_without_an_example_of_a_call_warm_says_how_to_give_one(
    name: str, says: str, module: Path, eager: Run
) -> None:
    done = eager("warm", f"declared:{name}")
    assert (done.code, done.error) == (2, "no-example-inputs")
    assert says in done.err
    assert "example_inputs" in done.err


def test_run_says_that_a_declared_class_is_called_by_a_program(module: Path, eager: Run) -> None:
    done = eager("run", "declared:Decoder")
    assert (done.code, done.error) == (2, "declared-class")
    assert "program of your own" in done.err
