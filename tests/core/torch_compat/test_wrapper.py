from __future__ import annotations

import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    # Importing Inductor makes torch use its own deprecated `torch.jit.script_method`.
    warnings.simplefilter("ignore", DeprecationWarning)
    from vllmc.core.torch_compat.wrapper import NotPortable, Reduced, reduce_wrapper


WRAPPER = """
from ctypes import c_void_p, c_int
import torch
import os, math
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels
aten = torch.ops.aten
empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu
async_compile = AsyncCompile()

cpp_fused_0 = async_compile.cpp_pybinding(['float*'], 'source')

async_compile.wait(globals())
del async_compile

def helper(x):
    return math.floor(x)

def call(args):
    arg0_1, = args
    args.clear()
    buf0 = empty_strided_cpu((helper(4.5),), (1,), torch.float32)
    cpp_fused_0(arg0_1, buf0)
    return (buf0, [i for i in range(2)])

def benchmark_compiled_module(times=10):
    from torch._inductor.utils import print_performance
    return print_performance(lambda: call([aten]))

if __name__ == "__main__":
    benchmark_compiled_module()
"""


def reduce(source: str, *provided: str) -> Reduced:
    return reduce_wrapper(source, provided=frozenset(provided))


def test_what_call_does_not_reach_is_dropped() -> None:
    reduced = reduce(WRAPPER, "cpp_fused_0", "cpp_fused_1")
    for gone in ("benchmark", "async_compile", "AsyncCompile", "ctypes", "aten", "import os"):
        assert gone not in reduced.source
    for kept in ("import math", "def helper", "empty_strided_cpu =", "import torch"):
        assert kept in reduced.source
    assert reduced.provided == ("cpp_fused_0",)


def test_the_result_runs_with_what_is_provided() -> None:
    reduced = reduce(WRAPPER, "cpp_fused_0")
    calls: list[Any] = []
    namespace: dict[str, Any] = {"cpp_fused_0": lambda *args: calls.append(args)}
    exec(reduced.source, namespace)
    args = [1]
    (buffer, numbers) = namespace["call"](args)
    assert args == []
    assert buffer.shape == (4,)
    assert numbers == [0, 1]
    assert len(calls) == 1


def test_a_kernel_that_is_not_provided_would_be_compiled_on_loading() -> None:
    with pytest.raises(NotPortable, match="async_compile"):
        reduce(WRAPPER)


def test_a_wrapper_in_cpp_would_be_compiled_on_loading() -> None:
    source = (
        "from torch._inductor.codecache import CppWrapperCodeCache\n"
        "inductor_entry = CppWrapperCodeCache.load_pybinding(main_code='')\n"
        "call = inductor_entry\n"
    )
    with pytest.raises(NotPortable, match="codecache"):
        reduce(source)


@pytest.mark.parametrize(
    "binding",
    ["for scale in range(3): pass", "if True:\n    scale = 2", "with open('x') as scale: pass", ""],
)
def test_a_name_bound_out_of_sight_is_refused_before_it_is_missed(binding: str) -> None:
    with pytest.raises(NotPortable, match="scale"):
        reduce(f"{binding}\ndef call(args):\n    return (scale,)\n")


@pytest.mark.parametrize(
    "body",
    [
        "return tuple(x for x in args)",
        "scale = 1\n    return (lambda: scale)()",
        "import math as scale\n    return scale",
        "try:\n        return len(args)\n    except ValueError as scale:\n        raise scale",
    ],
)
def test_names_of_a_function_are_its_own(body: str) -> None:
    assert reduce(f"def call(args):\n    {body}\n").provided == ()


EXTERN = (
    "from torch._inductor.select_algorithm import extern_kernels\n"
    "def call(args):\n"
    "    extern_kernels.mm(args[0], args[1], out=args[2])\n"
    "    return (extern_kernels.{name}(args[0], args[1]),)\n"
)


@pytest.mark.parametrize("name", ["addmm", "bmm", "baddbmm", "convolution", "_grouped_mm"])
def test_library_calls_that_torch_has_need_no_inductor(name: str) -> None:
    reduced = reduce(EXTERN.format(name=name))
    assert "_inductor" not in reduced.source
    assert reduced.provided == ("extern_kernels",)
    assert dict(reduced.products) == {"mm": "mm", name: name}


def test_a_library_call_of_inductor_brings_its_import() -> None:
    reduced = reduce(EXTERN.format(name="bias_addmm"))
    assert "from torch._inductor.select_algorithm import extern_kernels" in reduced.source
    assert reduced.provided == ()
    assert reduced.products == ()
