import pytest

from vllmc.core.errors import VllmcError
from vllmc.core.torch_compat.minors import MINORS, TORCH, chosen
from vllmc.core.torch_compat.minors.newest import Newest
from vllmc.core.torch_compat.minors.torch_2_11 import Torch211
from vllmc.core.torch_compat.minors.torch_2_13 import Torch213
from vllmc.core.torch_compat.version import NEWEST, OLDEST, installed_torch, minor_of, standing


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("2.9.1+cu128", "too-old"),
        ("1.13.0", "too-old"),
        ("2.11.0", "known"),
        ("2.13.0+cpu", "known"),
        ("2.15.1+cu132", "known"),
        ("2.16.0a0+git1", "newer"),
        ("3.0.0", "newer"),
    ],
)
def test_a_version_is_too_old_known_or_newer(version: str, told: str) -> None:
    assert standing(version) == told


def test_every_minor_that_is_known_has_its_class_and_no_other_has() -> None:
    between = [(2, minor) for minor in range(OLDEST[1], NEWEST[1] + 1)]
    assert OLDEST[0] == NEWEST[0] == 2
    assert list(MINORS) == between


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.11.1", Torch211), ("2.13.0+cpu", Torch213), ("2.15.0", Newest), ("2.16.0", Newest)],
)
def test_the_class_is_chosen_by_the_minor_version(version: str, expected: type) -> None:
    assert type(chosen(version)) is expected


def test_the_installed_torch_is_what_was_chosen_for() -> None:
    assert type(TORCH) is MINORS[minor_of(installed_torch())]


def test_an_older_torch_is_refused_with_what_it_lacks() -> None:
    with pytest.raises(
        VllmcError, match=r"torch-too-old.*torch 2\.10\.1\+cu128 is too old"
    ) as caught:
        chosen("2.10.1+cu128")
    assert "shape_id" in caught.value.context["lacking"]
    assert caught.value.hint == "pip install 'torch>=2.11' --upgrade"


def test_what_is_no_version_is_said_to_be_none() -> None:
    with pytest.raises(VllmcError, match="torch-unreadable"):
        minor_of("main")
