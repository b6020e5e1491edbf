import pytest

from vllmc.core.torch_compat.version import supports_shape_ids


@pytest.mark.parametrize(
    ("version", "can"),
    [("2.10.1+cu128", False), ("2.11.0", True), ("2.13.0+cpu", True), ("3.0.0a0+git1", True)],
)
def test_shape_ids_are_known_by_the_version(version: str, can: bool) -> None:
    assert supports_shape_ids(version) is can
    assert supports_shape_ids()
