"""What vllmc requires, against what vLLM pins: both must fit into one environment."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# Of what vLLM's metadata require, the packages that vllmc requires as well.
PINS = {
    "0.32.0": ("torch==2.13.0", "transformers<5.20.0,>=5.16.1", "numpy"),
    "0.33.0": ("torch==2.14.0", "transformers<5.21.0,>=5.16.1", "numpy"),
}


def applying(requirements: Iterable[str]) -> dict[str, Requirement]:
    """Those that count here, without extras, by name."""
    found = map(Requirement, requirements)
    return {
        canonicalize_name(r.name): r
        for r in found
        if r.marker is None or r.marker.evaluate({"extra": ""})
    }


def conflicts(theirs: dict[str, Requirement]) -> list[str]:
    """The requirements of vllmc's that no version fits that vLLM takes."""
    found = []
    for name, ours in applying(metadata.requires("vllmc") or ()).items():
        if name not in theirs:
            continue
        both = ours.specifier & theirs[name].specifier
        lowest = max(Version(s.version) for s in both if s.operator in (">=", "=="))
        if not both.contains(lowest):
            found.append(f"{ours} and {theirs[name]}")
    return found


@pytest.mark.parametrize("release", PINS)
def test_no_requirement_conflicts_with_the_pins_of_a_known_release(release: str) -> None:
    assert conflicts(applying(PINS[release])) == []


def test_a_conflict_is_seen() -> None:
    assert len(conflicts(applying(["torch==2.10.0", "transformers<5.17"]))) == 2


@pytest.mark.vllm
def test_no_requirement_conflicts_with_those_of_the_vllm_that_is_installed() -> None:
    found = [d for d in metadata.distributions(name="vllm") if d.requires]
    if not found:
        pytest.skip("vLLM is not installed, or its metadata has no requirements")
    theirs = applying(found[0].requires or ())
    assert conflicts(theirs) == []
    shared = set(theirs) & set(applying(metadata.requires("vllmc") or ()))
    if (pins := PINS.get(found[0].version)) is not None:
        assert {r: theirs[r].specifier for r in shared} == {
            r: q.specifier for r, q in applying(pins).items()
        }
