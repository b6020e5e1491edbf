"""What is predicted is what happens: random changes, a prediction, and then a real warm.

Each example is a store that starts empty, and a few states one after the other. Whatever was
stored before, a predicted hit compiles nothing and a predicted miss compiles something; the
program computes what the plain module does; and what came from the store is what a compilation
into an empty store gives. `unknown` is said only where capture alone can tell.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from foretold import PICKED, Attempt, State, attempt, attempt_together, codes
from hypothesis import event, given, settings
from hypothesis import strategies as st

from vllmc.core.torch_compat.minors import TORCH

_FLAGS = tuple(
    (group, name, not value)
    for group, module in (
        ("inductor", torch._inductor.config),
        ("functorch", torch._functorch.config),
    )
    for name, value in sorted(module.get_config_copy().items())
    if type(value) is bool
)

# What makes another key, another program, or neither; of each field, a few values.
_SPEC: dict[str, Sequence[Any]] = {
    "dtype": ("bfloat16",),
    "ranges": (((1, 1), (2, 8)), ((1, 16),)),
    "sizes": ((6,), (4,)),
    "dynamic_shapes": ("backed", "backed-size-oblivious"),
    "layer_names": ("baked",),
    "cuts": (("torch.nn.functional.relu",),),
    "options": ((("max_autotune", True),), (("size_asserts", False),)),
    "environment": ((("TENSORIFY_PYTHON_SCALARS", "1"),), (("HOME", "/elsewhere"),)),
    "torch_state": (
        (("default_dtype", torch.float64),),
        (("matmul_precision", "high"),),
        (("deterministic", True),),
        (("threads", 1),),
    ),
}
_PYTHON: dict[str, Sequence[Any]] = {
    "comment": ("another",),
    "ratio": (2.0,),
    "activation": ("square", "abs"),
    "multiplier": (3.0,),
    "terms": ((1.0,), (1.0, 2.0)),
    "bias": (2.0,),
    "unread": (1,),
    "layers": (2,),
    "class_gain": (2.0,),
    "instance_shift": (1.0,),
    "default": (1.0,),
    "literal": (3.0,),
    "picked": ("lambda_", "member"),
    "amount": (2,),
    "variables": ((("FORETOLD_TOY", "1"),), (("FORETOLD_OTHER", "1"),)),
}
_LLAMA: dict[str, Sequence[Any]] = {
    "num_hidden_layers": (2,),
    "hidden_act": ("gelu",),
    "rms_norm_eps": (1e-3,),
    "intermediate_size": (16,),
    "tie_word_embeddings": (True,),
    "attention_bias": (True,),
    "bos_token_id": (3,),
    "use_cache": (False,),
    "transformers_version": ("4.0.0",),
}


# Options that show in Inductor's code on a CPU, or do not.
_OPTIONS: Sequence[tuple[str, Any]] = (
    ("size_asserts", False),
    ("nan_asserts", True),
    ("epilogue_fusion", False),
    ("cpp.simdlen", 256),
    ("debug_index_asserts", True),
    ("max_autotune", True),
)


def _one_of(pool: dict[str, Sequence[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    pairs = [(name, value) for name, values in pool.items() for value in values]
    return st.sampled_from(pairs).map(lambda pair: {pair[0]: pair[1]})


_FLAG = st.sampled_from(_FLAGS).map(lambda flag: {"config": (flag,)})
_PLACE = st.sampled_from(("worker", "apart")).map(lambda place: {"place": place})
_TOY_CHANGE = st.one_of(_one_of(_SPEC), _one_of(_PYTHON), _FLAG, _PLACE)
_LLAMA_CHANGE = st.one_of(
    _one_of(_SPEC), _one_of(_LLAMA).map(lambda c: {"llama": tuple(c.items())}), _FLAG
)


_INDUCTOR_CHANGE = st.one_of(
    st.sampled_from(_OPTIONS).map(lambda option: {"options": (option,)}),
    st.sampled_from(_OPTIONS).map(lambda option: {"config": (("inductor", *option),)}),
    _one_of({name: _SPEC[name] for name in ("ranges", "sizes", "dynamic_shapes", "torch_state")}),
    _one_of({name: _PYTHON[name] for name in ("comment", "multiplier", "layers")}),
)
_THREAD_SPEC = {k: v for k, v in _SPEC.items() if k not in ("torch_state", "environment")}
# Where an option is the whole process's, a thread has none to itself.
_THREAD_CHANGE = st.one_of(_one_of(_THREAD_SPEC), *([_FLAG] if TORCH.local_overrides else []))


def _states(
    change: st.SearchStrategy[dict[str, Any]], **base: Any
) -> st.SearchStrategy[list[State]]:
    """Two or three states that share most of what they are, and one of them once more."""

    def state(changes: list[dict[str, Any]]) -> State:
        return State(**functools.reduce(lambda a, b: a | b, changes, base))

    changed = st.lists(change, min_size=1, max_size=2).map(state)
    several = st.lists(changed, min_size=2, max_size=3, unique=True)
    return several.flatmap(lambda known: st.sampled_from(known).map(lambda again: [*known, again]))


def _compiled_alone(state: State) -> State:
    """What is stored of a state is that of this one."""
    return dataclasses.replace(state, place="here")


@functools.cache
def _fresh(state: State) -> tuple[Any, Any]:
    """The layout of the program, and the code of its units, compiled into an empty store."""
    with tempfile.TemporaryDirectory() as scratch:
        done = attempt(state, Path(scratch), Path(scratch) / "store")
        assert done.ready is not None, done.error
        return done.ready.record.program, codes(Path(scratch) / "store", done.ready.record)


def _check(state: State, done: Attempt, store: Path) -> None:
    """What holds whatever else happens in the store at the same time."""
    predicted = done.prediction.outcome
    event(f"{predicted}, {done.error.code if done.error else f'compiled {done.compiled > 0}'}")
    assert done.prediction.reason
    if done.error is not None:
        # Weights are never frozen into code; a thread that does not see the options of the
        # caller compiles nothing.
        refused = any(name == "freezing" for _, name, _ in state.config)
        assert (done.error.code == "bad-option" and refused) or (
            done.error.code == "config-changed" and state.place == "apart"
        ), (done.error, done.error.context)
        assert predicted != "hit"
        return
    assert done.ready is not None
    assert done.result is not None
    torch.testing.assert_close(done.result, done.expected)
    if predicted == "hit":
        assert done.compiled == 0, "a wrong hit"
    if not done.compiled:
        found = (done.ready.record.program, codes(store, done.ready.record))
        assert found == _fresh(_compiled_alone(state)), "a wrong hit"


def _check_alone(state: State, done: Attempt, store: Path, before: Sequence[State]) -> None:
    """What holds in a store of which nothing is known but the states `before`."""
    _check(state, done, store)
    predicted = done.prediction.outcome
    if predicted == "miss" and done.error is None:
        assert done.compiled > 0, "a wrong miss"
    stored = {_compiled_alone(s) for s in before}
    if _compiled_alone(state) in stored:
        assert predicted == "hit", "what was just stored is there"
    elif not stored:
        assert predicted == "miss", "there is nothing that could serve"
    elif any(
        dataclasses.replace(s, options=state.options, backend=state.backend) == state
        for s in stored
    ):
        assert predicted != "unknown", "it was captured, and compiled otherwise"


def _follow(states: Sequence[State]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        before: list[State] = []
        for state in states:
            done = attempt(state, root, root / "store")
            _check_alone(state, done, root / "store", before)
            if done.error is None:
                before.append(state)


# Examples take a second or two: a part of what others take.
@settings(max_examples=settings.default.max_examples // 8)
@given(_states(_TOY_CHANGE))
def test_a_prediction_holds_whatever_changes_in_a_package_of_python(states: list[State]) -> None:
    _follow(states)


@settings(max_examples=settings.default.max_examples // 25)
@given(_states(_LLAMA_CHANGE, llama=()))
def test_a_prediction_holds_whatever_changes_in_a_configuration(states: list[State]) -> None:
    _follow(states)


@pytest.mark.slow
@settings(max_examples=settings.default.max_examples // 50)
@given(_states(_INDUCTOR_CHANGE, backend="inductor"))
def test_a_prediction_holds_whatever_changes_in_what_inductor_compiles(states: list[State]) -> None:
    _follow(states)


@settings(max_examples=settings.default.max_examples // 25)
@given(_states(_THREAD_CHANGE))
def test_threads_with_options_of_their_own_get_what_each_asked_for(states: list[State]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for _ in range(2):
            for state, done in zip(
                states, attempt_together(states, root, root / "store"), strict=True
            ):
                _check(state, done, root / "store")


@pytest.mark.parametrize("kind", [kind for kind in PICKED if kind != "none"])
def test_a_python_value_is_never_mistaken_for_another(kind: str, tmp_path: Path) -> None:
    one, other = (State(picked=kind, amount=amount) for amount in (1, 2))
    done = [attempt(state, tmp_path, tmp_path / "store") for state in (one, other, one)]
    for tried in done:
        assert tried.error is None
        assert tried.result is not None
        torch.testing.assert_close(tried.result, tried.expected, equal_nan=True)
    assert done[1].prediction.outcome == "unknown", "it was never captured"
    assert done[2].prediction.outcome == "hit", "it is as it was"
    assert done[2].compiled == 0
