from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from vllmc.core.torch_compat.minors import TORCH
from vllmc.core.torch_compat.unbacked import mark_unbacked_size


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def marked(size: int, *, low: int) -> torch.Tensor:
    tensor = torch.ones(size, 4)
    mark_unbacked_size(tensor, 0, low=low)
    return tensor


def test_a_marked_size_is_compiled_once() -> None:
    counter = CompileCounter()
    double = torch.compile(lambda x: x * 2, fullgraph=True, backend=counter)
    for size in (2, 1, 64, 0):
        assert double(marked(size, low=0)).shape == (size, 4)
    assert counter.frame_count == 1


@pytest.mark.skipif(not TORCH.takes_least_size, reason="this torch takes no least size")
def test_code_may_branch_on_the_least_size() -> None:
    def sign(x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[0] >= 3 else -x

    compiled = torch.compile(sign, fullgraph=True, backend="eager")
    assert torch.equal(compiled(marked(5, low=3)), torch.ones(5, 4))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
        compiled(marked(5, low=2))
