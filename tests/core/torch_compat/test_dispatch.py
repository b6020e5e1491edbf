from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vllmc.core.torch_compat.dispatch import has_backend_kernel, is_watched


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_nothing_watches_a_plain_tensor_without_gradients() -> None:
    with torch.no_grad():
        assert not is_watched(torch.ones(2))
    with torch.inference_mode():
        assert not is_watched(torch.ones(2))


@pytest.mark.parametrize(
    "context",
    [torch.enable_grad(), FunctionMode(), DispatchMode(), torch.profiler.profile(acc_events=True)],
    ids=["autograd", "function mode", "dispatch mode", "profiler"],
)
def test_what_looks_at_calls_watches(context: AbstractContextManager[Any]) -> None:
    tensor = torch.ones(2)
    with torch.no_grad():
        with context:
            assert is_watched(tensor)
        assert not is_watched(tensor)


def test_a_tensor_of_a_class_of_its_own_is_watched() -> None:
    with torch.no_grad():
        assert is_watched(torch.nn.Parameter(torch.ones(2)))
        assert is_watched(torch.ones(2).as_subclass(type("Own", (torch.Tensor,), {})))


def test_a_kernel_for_one_backend_is_found() -> None:
    library = torch.library.Library("vllmc_dispatch_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    op = torch.ops.vllmc_dispatch_test.twice.default
    assert not has_backend_kernel(op)
    library.impl("twice", lambda x: x + x, "CPU")
    assert has_backend_kernel(op)
    library._destroy()
