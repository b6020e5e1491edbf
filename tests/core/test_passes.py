"""Which passes run, and for which compile ranges."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllmc.core.errors import UsageError
from vllmc.core.graph.passes import manager
from vllmc.core.graph.passes.manager import identity, passes_at
from vllmc.core.passes import PASSES, PassChoice, chosen, default_passes
from vllmc.core.ranges import OPEN_END, CompileRange


def names(added: list[str], removed: list[str]) -> list[str]:
    return [str(choice) for choice in chosen(added, removed, "cpu")]


def test_those_of_the_device_run_unless_told_otherwise() -> None:
    both = ["attention-quant", "no-ops", "shared-quant"]
    assert names([], []) == sorted([*both, "expand-quant"])
    assert chosen([], [], "cpu") == default_passes("cpu")
    on_gpu = [str(choice) for choice in chosen([], [], "cuda:1")]
    assert on_gpu == sorted([*both, "activation-quant", "norm-quant"])


def test_one_is_left_out_by_name() -> None:
    assert names([], ["no-ops"]) == ["attention-quant", "expand-quant", "shared-quant"]


def test_all_are_left_out_but_those_that_are_named() -> None:
    assert names([], ["all"]) == []
    assert names(["norm-quant", "no-ops"], ["all"]) == ["no-ops", "norm-quant"]
    assert set(names(["all"], ["all"])) == set(PASSES)


def test_a_name_says_more_than_all() -> None:
    assert set(names(["all"], ["norm-quant"])) == set(PASSES) - {"norm-quant"}
    assert names(["no-ops"], ["all", "no-ops"]) == ["no-ops"]
    assert "norm-quant@1:8" in names(["all", "norm-quant@1:8"], [])


def test_one_cannot_have_two_ranges() -> None:
    assert names(["no-ops@1:8", "no-ops@1:8"], ["all"]) == ["no-ops@1:8"]
    for given in (["no-ops@9:16", "no-ops@1:8"], ["no-ops@1:8", "no-ops"]):
        with pytest.raises(UsageError, match="the pass no-ops is to run as no-ops") as error:
            names(given, [])
        assert error.value.code == "bad-range"


def test_one_may_be_limited_to_compile_ranges() -> None:
    (limited,) = chosen(["norm-quant@2:64"], ["all"], "cpu")
    assert limited == PassChoice("norm-quant", CompileRange(2, 64))
    assert str(limited) == "norm-quant@2:64"
    assert str(PassChoice.parse("no-ops@3")) == "no-ops@3:3"
    assert str(PassChoice.parse("no-ops@3:inf")) == "no-ops@3:inf"


@pytest.mark.parametrize(
    ("compiled", "applies"),
    [
        (CompileRange(2, 64), True),
        (CompileRange(5, 5), True),
        (CompileRange(1, 64), False),
        (CompileRange(2, 65), False),
        (CompileRange(65, OPEN_END), False),
        # What serves any number of tokens is compiled once for all ranges.
        (None, False),
    ],
)
def test_a_limited_pass_applies_to_ranges_within_its_own(
    compiled: CompileRange | None, applies: bool
) -> None:
    limited = PassChoice("norm-quant", CompileRange(2, 64))
    assert limited.applies_to(compiled) is applies
    assert PassChoice("norm-quant").applies_to(compiled)
    assert passes_at("post-grad", [limited], compiled) == ((limited,) if applies else ())


def test_they_run_in_the_order_of_the_catalogue() -> None:
    shuffled = sorted(map(PassChoice, PASSES), reverse=True)
    ordered = passes_at("post-grad", shuffled, None)
    assert [c.name for c in ordered] == [n for n, i in PASSES.items() if i.stage == "post-grad"]


def test_an_unknown_one_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="no pass 'norm-qant'") as error:
        chosen(["norm-qant"], [], "cpu")
    assert error.value.code == "unknown-pass"
    assert error.value.hint == "did you mean norm-quant?"


def test_what_all_ranges_share_cannot_be_limited_to_some() -> None:
    with pytest.raises(UsageError, match="captured graph") as error:
        chosen(["attention-quant@1:8"], [], "cpu")
    assert error.value.code == "bad-range"


@pytest.mark.parametrize("name", sorted(PASSES))
def test_each_has_an_implementation_and_an_identity(name: str) -> None:
    assert callable(manager._implementation(name))
    told = identity(PassChoice(name))
    assert told["version"] == PASSES[name].version
    limited = {"post-grad": [PassChoice(name, CompileRange(1, 8))], "captured": []}
    for other in limited[PASSES[name].stage]:
        assert identity(other) == {**told, "tokens": "1:8"}


def test_another_source_is_another_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = manager._HERE
    before = identity(PassChoice("no-ops"))
    for name in ("no_ops", "fusions"):
        (tmp_path / f"{name}.py").write_text((here / f"{name}.py").read_text())
    monkeypatch.setattr(manager, "_HERE", tmp_path)
    assert identity(PassChoice("no-ops")) == before
    fused = identity(PassChoice("norm-quant"))
    with (tmp_path / "no_ops.py").open("a") as file:
        file.write("# another\n")
    assert identity(PassChoice("no-ops"))["source"] != before["source"]
    assert identity(PassChoice("norm-quant")) == fused
