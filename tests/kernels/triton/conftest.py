"""Kernels under Triton's interpreter, on CPU tensors: each file is run in a process of its own.

Triton decides when it is imported whether it interprets kernels, and interpreting patches
`triton.language` for good: in one process no kernel could be compiled any more, ours or Inductor's.
So a file of this directory counts as one test, which runs pytest on the file with
`TRITON_INTERPRET=1`. For single tests set it yourself:

    TRITON_INTERPRET=1 pytest tests/kernels/triton/test_norm.py -k rows
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    _TORCH = {
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
    }
    # Types that numpy does not have: the interpreter keeps their bits.
    _BITS = {tl.bfloat16: torch.uint16, tl.float8e4nv: torch.uint8}

    def _convert_float(
        values: numpy.ndarray, source: tl.dtype, target: tl.dtype, rounding: object
    ) -> numpy.ndarray:
        """Rounds to nearest, as a GPU does.

        The interpreter's own function (Triton 3.6, 3.7) cuts off what bfloat16 has no bits for,
        and loses what carries into the exponent of fp8: 1.97 becomes 1.
        """
        numbers = torch.from_numpy(numpy.ascontiguousarray(values)).reshape(values.shape)
        if source in _BITS:
            numbers = numbers.view(_BITS[source]).view(_TORCH[source])
        result = numbers.to(_TORCH[target])
        return result.view(_BITS.get(target, result.dtype)).numpy()

    _dot = interpreter.InterpreterBuilder.create_dot

    def _create_dot(
        self: interpreter.InterpreterBuilder,
        left: interpreter.TensorHandle,
        right: interpreter.TensorHandle,
        *rest: object,
    ) -> interpreter.TensorHandle:
        """Multiplies numbers where the interpreter would multiply the bits of bfloat16."""
        operands = [
            interpreter.TensorHandle(
                _convert_float(operand.data, operand.dtype, tl.float32, None), tl.float32
            )
            if operand.dtype == tl.bfloat16
            else operand
            for operand in (left, right)
        ]
        return _dot(self, *operands, *rest)

    def _smaller(
        self: interpreter.InterpreterBuilder,
        left: interpreter.TensorHandle,
        right: interpreter.TensorHandle,
    ) -> interpreter.TensorHandle:
        """Of a number and NaN the number, as on a GPU; the interpreter would take the NaN."""
        return self.binary_op(left, right, numpy.fmin)

    def _larger(
        self: interpreter.InterpreterBuilder,
        left: interpreter.TensorHandle,
        right: interpreter.TensorHandle,
    ) -> interpreter.TensorHandle:
        """As `_smaller`."""
        return self.binary_op(left, right, numpy.fmax)

    _patch_lang = interpreter._patch_lang
    _patched: set[tuple[int, ...]] = set()

    def _patch_once(function: FunctionType) -> object:
        """Patches a language's modules at the first call, and never takes it back.

        The interpreter's own function does it at each call of a kernel and of its helpers, which is
        half the time of small kernels.
        """
        modules = tuple(id(v) for v in function.__globals__.values() if v is tl or v is tl.core)
        if modules not in _patched:
            _patched.add(modules)
            _patch_lang(function)
        return interpreter._LangPatchScope()

    interpreter._convert_float = _convert_float
    interpreter._patch_lang = _patch_once
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.InterpreterBuilder.create_minnumf = _smaller
    interpreter.InterpreterBuilder.create_maxnumf = _larger

    @pytest.fixture(autouse=True)
    def _overflows_are_no_warnings() -> Iterator[None]:
        """As on a GPU: what numpy warns of is infinite or no number, which tests look at."""
        with numpy.errstate(all="ignore"):
            yield

else:

    def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File:
        return InterpretedFile.from_parent(parent, path=module_path)


class InterpretedFile(pytest.File):
    """A file whose tests are one here: all of them, in a process that interprets kernels."""

    def collect(self) -> Iterator[pytest.Item]:
        yield InterpretedRun.from_parent(self, name="interpreted")


class InterpretedRun(pytest.Item):
    """Runs pytest on the file, with the options that select tests and examples."""

    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(self.path)]
        command += ["-m", self.config.option.markexpr]
        profile = self.config.getoption("--hypothesis-profile")
        command += ["--hypothesis-profile", profile] if profile else []
        run = subprocess.run(
            command,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            cwd=self.config.rootpath,
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise InterpretedTestsFailed(run.stdout + run.stderr)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:
        if isinstance(excinfo.value, InterpretedTestsFailed):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name}, interpreted"


class InterpretedTestsFailed(AssertionError):
    """What the inner pytest printed."""
