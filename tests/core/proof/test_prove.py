from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_llama

from vllmc.core.cache.key import Factor
from vllmc.core.cache.store import Store
from vllmc.core.events import SilentObserver
from vllmc.core.job import Job
from vllmc.core.models.resolve import resolve
from vllmc.core.proof.prove import Proof, prove
from vllmc.core.proof.workbench import Workbench
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat import system
from vllmc.core.torch_compat.options import option_names

EAGER = {"spec.backend": "eager", "spec.ranges": ["1:64"]}
SAME = ("same", True, 0.0)
NOTHING = ("unproved", None, None)
has_march = "cpp.march" in option_names("inductor")
FOREIGN = {"inductor.cpp.march": "x86-64-v9"} if has_march else {}
needs_march = pytest.mark.skipif(not has_march, reason="this torch has no cpp.march")
Sides = Callable[..., tuple[Factor, ...]]


class Notes(SilentObserver):
    """An observer that counts captures, and writes down what became of each unit."""

    def __init__(self) -> None:
        self.captures = 0
        self.outcomes: list[str] = []

    def stage(self, name: str) -> None:
        self.captures += name == "capture"

    def unit_finished(self, name: str, outcome: str, seconds: float) -> None:
        self.outcomes.append(outcome)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = save_llama(tmp_path_factory.mktemp("models") / "llama", layers=1)
    return resolve(str(directory), layers=None)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def bench(model: Any, root: Path, notes: Notes) -> Workbench:
    return Workbench(model, environment={}, store=Store(root), observer=notes)


@pytest.fixture(scope="session")
def plain(model: Any, root: Path) -> tuple[Factor, ...]:
    """The factors of this process with nothing set."""
    bench = Workbench(model, environment={}, store=Store(root), observer=Notes())
    return bench.plain_job().factors


@pytest.fixture(scope="session")
def side(plain: tuple[Factor, ...]) -> Sides:
    """Those factors with the eager backend and other values: `side({"group.name": value})`."""

    def make(values: dict[str, Any] | None = None) -> tuple[Factor, ...]:
        values = EAGER | (values or {})
        assert values.keys() <= {f"{f.group}.{f.name}" for f in plain}
        return tuple(
            dataclasses.replace(f, value=values.get(f"{f.group}.{f.name}", f.value)) for f in plain
        )

    return make


def found(proof: Proof) -> dict[str, tuple[Any, ...]]:
    """Code, bitwise and largest difference of each change, by the factor's name."""
    verdicts = {".".join(c.identity): c.verdict for c in proof.changes}
    verdicts["together"] = proof.together
    return {name: (v.code, v.bitwise, v.max_abs_diff) for name, v in verdicts.items()}


def reasons(proof: Proof) -> dict[str, str]:
    return {".".join(c.identity): c.verdict.reason for c in proof.changes}


def test_each_change_is_proved_alone_and_all_together_with_one_capture(
    side: Sides, bench: Workbench, notes: Notes
) -> None:
    changed = side({"inductor.max_autotune": True, "functorch.cse": False})
    proof = prove(side(), changed, bench)
    assert found(proof) == {
        "functorch.cse": SAME,
        "inductor.max_autotune": SAME,
        "together": SAME,
    }
    assert [c.verdict.of for c in proof.changes] == [2, 2]
    assert (proof.pieces, proof.together.of, proof.elsewhere) == (2, 2, ())
    assert notes.captures == 2, "of functorch's options capture may depend on any"
    assert len(notes.outcomes) == 8


def test_a_second_proof_compiles_nothing(
    side: Sides, bench: Workbench, notes: Notes, model: Any, root: Path
) -> None:
    changed = side({"inductor.size_asserts": False})
    prove(side(), changed, bench)
    again = Notes()
    proof = prove(
        side(), changed, Workbench(model, environment={}, store=Store(root), observer=again)
    )
    assert found(proof) == {"inductor.size_asserts": SAME, "together": SAME}
    assert again.outcomes == ["hit"] * 4, "one change alone is all changes together"
    assert again.captures == 1


def test_equal_sides_need_no_proof(side: Sides, bench: Workbench, notes: Notes) -> None:
    proof = prove(side(), side(), bench)
    assert (proof.changes, proof.pieces, proof.together.code) == ((), None, "unproved")
    assert (notes.captures, notes.outcomes) == (0, [])


def test_what_both_sides_set_is_set_for_the_proof(
    side: Sides, bench: Workbench, root: Path
) -> None:
    both = {"inductor.epilogue_fusion": False, "spec.dynamic_shapes": "backed-size-oblivious"}
    proof = prove(side(both), side(both | {"inductor.max_autotune": True}), bench)
    assert found(proof)["inductor.max_autotune"] == SAME
    assert proof.elsewhere == ()
    values = [
        {f"{f.group}.{f.name}": f.value for f in record.factors}
        for record in Store(root).readable_units()
    ]
    assert [v for v in values if both.items() <= v.items() and v["inductor.max_autotune"]]


def test_fields_of_the_spec_are_proved_and_results_compared_across_dtypes(
    side: Sides, bench: Workbench, notes: Notes
) -> None:
    changed = {
        "spec.dtype": "bfloat16",
        "spec.layer_names": "baked",
        "spec.ranges": ["1:16", "17:64"],
        "spec.dynamic_shapes": "backed",
    }
    proof = prove(side(), side(changed), bench)
    told = found(proof)
    for name in ("spec.layer_names", "spec.ranges", "spec.dynamic_shapes"):
        assert told[name] == SAME, name
    for name in ("spec.dtype", "together"):
        code, bitwise, difference = told[name]
        assert (code, bitwise) == ("differs", False)
        assert 1e-4 < difference < 0.5
    assert notes.captures == 6, "the first side, each field, and all"


def test_what_cannot_be_set_is_unproved_and_the_reason_says_so(
    side: Sides, bench: Workbench, notes: Notes
) -> None:
    digest = f"package.function#{'a' * 64}"
    changed = side(
        {
            "versions.torch": "3.0",
            "model.vocab_size": 7,
            "inductor.post_grad_custom_pre_pass": digest,
            **FOREIGN,
        }
    )
    novel = Factor(group="inductor", name="novel", value=1)
    lacking = tuple(f for f in side() if f.name != "max_autotune")
    proof = prove(lacking, (*changed, novel), bench)
    assert set(found(proof).values()) == {NOTHING}
    told = reasons(proof)
    assert told["versions.torch"] == "another version would have to be installed"
    assert told["model.vocab_size"].startswith("what is compiled is the model that was named")
    assert told["inductor.post_grad_custom_pre_pass"].startswith("only a digest of its value")
    for name in FOREIGN:
        assert told[name] == "this CPU may not run code for x86-64-v9"
    assert told["inductor.max_autotune"] == "only one of the sides has it"
    assert told["inductor.novel"].startswith("there is no option 'novel'")
    assert proof.together.reason == "no change can be made here"
    assert (proof.pieces, notes.captures) == (None, 0), "nothing is compiled for nothing"


def test_what_cannot_be_proved_does_not_keep_the_rest_from_it(
    side: Sides, bench: Workbench
) -> None:
    proof = prove(side(), side({"versions.torch": "3.0", "inductor.max_autotune": True}), bench)
    assert found(proof) == {
        "versions.torch": NOTHING,
        "inductor.max_autotune": SAME,
        "together": SAME,
    }


@needs_march
def test_a_value_of_the_first_side_that_cannot_be_set_leaves_its_change_unproved(
    side: Sides, bench: Workbench
) -> None:
    proof = prove(side(FOREIGN), side(), bench)
    assert reasons(proof) == {"inductor.cpp.march": "this CPU may not run code for x86-64-v9"}


def test_a_change_that_does_not_compile_says_why(side: Sides, bench: Workbench) -> None:
    frozen = side({"inductor.freezing": True, "inductor.max_autotune": True})
    proof = prove(side(), frozen, bench)
    assert found(proof) == {
        "inductor.freezing": NOTHING,
        "inductor.max_autotune": SAME,
        "together": SAME,
    }, "what cannot be compiled does not keep the rest from being proved together"
    assert reasons(proof)["inductor.freezing"].startswith("freezing puts the weights into the code")
    back = prove(frozen, side(), bench)
    assert set(found(back).values()) == {NOTHING}
    assert back.pieces is None
    assert back.together.reason.startswith("side a cannot be compiled: freezing puts the weights")


def test_ranges_that_hold_only_together_are_proved_together(side: Sides, bench: Workbench) -> None:
    proof = prove(side(), side({"spec.ranges": [], "spec.sizes": [4, 8]}), bench)
    told = found(proof)
    assert told["spec.ranges"] == NOTHING
    assert reasons(proof)["spec.ranges"] == "there is neither a compile range nor a compile size"
    assert told["spec.sizes"] == told["together"] == SAME


def test_a_factor_that_follows_from_an_option_is_proved_with_it(
    side: Sides, bench: Workbench, plain: tuple[Factor, ...]
) -> None:
    features = next(f.value for f in plain if f.name == "cpu_features")
    native = system.cpu_features(march="native")
    if native == features:
        pytest.skip("this CPU's code is native code")
    changed = side({"inductor.cpp.march": "native", "system.cpu_features": native})
    proof = prove(side(), changed, bench)
    follows = {".".join(c.identity): c.follows for c in proof.changes}
    assert follows == {"system.cpu_features": True, "inductor.cpp.march": False}
    other = side({"inductor.cpp.march": "native", "system.cpu_features": ["mmx"]})
    assert not any(c.follows for c in prove(side(), other, bench).changes)


def test_what_the_sides_have_in_common_and_this_process_has_not_is_told(
    side: Sides, bench: Workbench
) -> None:
    both = {"versions.torch": "3.0", **FOREIGN, "model.vocab_size": 7}
    proof = prove(side(both), side(both | {"inductor.max_autotune": True}), bench)
    foreign = {("inductor", name.removeprefix("inductor.")) for name in FOREIGN}
    assert set(proof.elsewhere) == {("versions", "torch")} | foreign
    assert found(proof)["inductor.max_autotune"] == SAME


def test_a_side_sets_nothing_that_is_no_factor(side: Sides, model: Any, root: Path) -> None:
    asked: set[str] = set()

    class Watched(Workbench):
        def job(self, spec: CompileSpec) -> Job:
            asked.update(name for name, _ in spec.inductor)
            return super().job(spec)

    bench = Watched(model, environment={}, store=Store(root), observer=Notes())
    # A snapshot may come from anywhere, and this option names a program to start.
    a, b = (Factor(group="inductor", name="cpp.cxx", value=[name]) for name in ("one", "other"))
    proof = prove((*side(), a), (*side({"inductor.max_autotune": True}), b), bench)
    assert asked == {"max_autotune"}
    assert found(proof)["inductor.cpp.cxx"] == NOTHING
    assert prove((*side(), a), (*side(), a), bench).changes == ()
    assert asked == {"max_autotune"}


@pytest.mark.thorough
@pytest.mark.slow
def test_inductor_proves_which_options_change_code_and_which_results(
    side: Sides, bench: Workbench, notes: Notes, model: Any, root: Path
) -> None:
    base = {"spec.backend": "inductor", "spec.dtype": "bfloat16"}
    changes = {
        "inductor.triton.unique_kernel_names": False,
        "inductor.size_asserts": False,
        "inductor.emulate_precision_casts": True,
    }
    a, b = side(base), side(base | changes)
    proof = prove(a, b, bench)
    told = found(proof)
    assert told["inductor.triton.unique_kernel_names"] == SAME
    assert told["inductor.size_asserts"] == ("differs", True, 0.0)
    for name in ("inductor.emulate_precision_casts", "together"):
        code, bitwise, difference = told[name]
        assert (code, bitwise) == ("differs", False)
        assert 1e-4 < difference < 0.5
    assert proof.together.differing == ("piece_0 for 1:64 tokens", "piece_2 for 1:64 tokens")
    assert notes.captures == 1
    assert sorted(notes.outcomes) == ["compiled"] * 8 + ["dup"] * 2
    again = Notes()
    bench = Workbench(model, environment={}, store=Store(root), observer=again)
    assert prove(a, b, bench) == proof
    assert again.outcomes == ["hit"] * 10
