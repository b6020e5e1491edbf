from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vllmc.core.torch_compat.ops import registrations

HERE = Path(__file__)


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    library = torch.library.Library("vllmc_ops_test", "FRAGMENT")
    yield library
    library._destroy()


def test_an_op_is_found_by_the_file_that_implements_it(library: torch.library.Library) -> None:
    library.define("plain(Tensor x) -> Tensor")
    library.impl("plain", torch.clone, "CPU")
    [(file, line)] = registrations("vllmc_ops_test::plain")
    assert Path(file) == HERE
    assert "Library(" in HERE.read_text().splitlines()[line - 1]


def test_an_op_all_of_whose_overloads_have_names_is_found(library: torch.library.Library) -> None:
    library.define("named.Tensor(Tensor x) -> Tensor")
    library.impl("named.Tensor", torch.clone, "CPU")
    assert {Path(file) for file, _ in registrations("vllmc_ops_test::named")} == {HERE}


def test_the_fake_implementation_counts(library: torch.library.Library) -> None:
    library.define("faked.Tensor(Tensor x) -> Tensor")
    before = registrations("vllmc_ops_test::faked")
    torch.library.register_fake("vllmc_ops_test::faked.Tensor", torch.clone, lib=library)
    assert len(registrations("vllmc_ops_test::faked")) == len(before) + 1


@pytest.mark.parametrize("name", ["aten::relu", "vllmc::unified_attention_with_output"])
def test_ops_that_are_factors_of_their_own_have_no_place(name: str) -> None:
    assert registrations(name) == ()


def test_an_op_that_is_not_registered_is_an_error() -> None:
    with pytest.raises(LookupError):
        registrations("vllmc_ops_test::absent")
