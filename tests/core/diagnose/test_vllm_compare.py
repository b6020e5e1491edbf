from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllmc.core.cache.explain import Change
from vllmc.core.diagnose.vllm_cache import read_caches
from vllmc.core.diagnose.vllm_compare import (
    KeyComparison,
    Subject,
    cache_subjects,
    compare_keys,
    like_with_like,
    log_subjects,
)
from vllmc.core.diagnose.vllm_factors import KeyFacts
from vllmc.core.diagnose.vllm_log import read_log


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    """The subject of a start's cache."""
    count = iter(range(100))

    def store(start: Any, **where: str) -> Subject:
        [cache] = read_caches(start.store(tmp_path / str(next(count)), **where))
        return cache_subjects(cache)[0]

    return store


@pytest.fixture
def logged(tmp_path: Path) -> Any:
    """The subjects of a log."""

    def log(text: str) -> tuple[Subject, ...]:
        path = tmp_path / "log"
        path.write_text(text)
        return log_subjects(read_log(path))

    return log


def names(found: KeyComparison) -> list[str]:
    return [f"{change.group}.{change.name}" for change in found.changes]


def only(found: KeyComparison) -> Change:
    [change] = found.changes
    return change


def noted(found: KeyComparison, text: str) -> bool:
    return any(text in note for note in found.notes)


def test_equal_keys_have_no_difference(vllm_start: Any, stored: Any) -> None:
    found = compare_keys(stored(vllm_start), stored(vllm_start))
    assert (found.changes, found.notes) == ((), ())
    assert found.same == len(vllm_start.env) + 3


def test_a_spurious_variable_affects_the_key_and_says_how_to_pin_it(
    vllm_start: Any, stored: Any
) -> None:
    other = vllm_start.change(env={"VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.9.4"})
    found = compare_keys(stored(vllm_start), stored(other))
    change = only(found)
    assert (change.before, change.after) == ("10.0.3.17", "10.0.9.4")
    assert (change.klass, change.affects_key) == ("surroundings", True)
    assert "shapes no code" in change.note
    assert "0.24 or later" in change.note
    assert noted(found, "everything that differs is spurious")
    assert noted(found, "graphs: identical")


def test_another_variable_may_shape_code_and_comes_first(vllm_start: Any, stored: Any) -> None:
    other = vllm_start.change(
        env={"VLLM_CONFIG_ROOT": "/root/.config/vllm", "VLLM_USE_DEEP_GEMM": False},
        compiler="0" * 10,
    )
    found = compare_keys(stored(vllm_start), stored(other))
    assert names(found) == [
        "vllm.env.VLLM_USE_DEEP_GEMM",
        "vllm.env.VLLM_CONFIG_ROOT",
        "vllm.compiler.hash",
    ]
    assert [c.klass for c in found.changes] == ["codegen", "surroundings", "unknown"]
    assert not noted(found, "everything that differs is spurious")


def test_secrets_that_differ_are_named_without_their_values(vllm_start: Any, stored: Any) -> None:
    one, two = (vllm_start.change(env={"VLLM_API_KEY": key}) for key in ("hunter2", "hunter3"))
    change = only(compare_keys(stored(one), stored(two)))
    assert (change.name, change.klass) == ("VLLM_API_KEY", "secret")
    assert (change.before, change.after) == ("<redacted>", "<redacted>")
    found = compare_keys(stored(vllm_start), stored(one))
    assert (only(found).klass, only(found).before) == ("secret", None)
    assert compare_keys(stored(one), stored(one)).changes == ()


def test_a_change_of_the_config_is_told_by_ranges_and_graphs(vllm_start: Any, stored: Any) -> None:
    other = vllm_start.change(
        config="f" * 10, ranges=((1, 16384),), graph=vllm_start.graph.replace("64]", "128]")
    )
    found = compare_keys(stored(vllm_start), stored(other))
    assert names(found) == ["vllm.config.hash"]
    assert (only(found).klass, only(found).affects_key) == ("unknown", True)
    assert "cannot be told" in only(found).note
    assert noted(found, "1:8192 and 1:16384")
    assert noted(found, "graphs: different, of 7 and 7 pieces")


def test_another_virtual_environment_is_told_by_the_sources(vllm_start: Any, stored: Any) -> None:
    root = "/home/u/v/lib/python3.12/site-packages"
    other = vllm_start.change(root=root, graph=vllm_start.graph.replace(vllm_start.root, root))
    found = compare_keys(stored(vllm_start), stored(other))
    assert names(found) == ["vllm.code.hash"]
    assert noted(found, f"the sources lie in {vllm_start.root} and in {root}")
    assert not noted(found, "quote other lines")
    assert noted(found, "graphs: identical")


def test_a_changed_source_is_told_by_what_the_graphs_quote(vllm_start: Any, stored: Any) -> None:
    other = vllm_start.change(sources="other", graph=vllm_start.graph.replace(".py:118", ".py:119"))
    found = compare_keys(stored(vllm_start), stored(other))
    assert noted(found, "quote other lines of vllm/model_executor/models/llama.py")


def test_files_traced_on_one_side_alone_are_named(vllm_start: Any, logged: Any) -> None:
    text = vllm_start.log()
    other = text.replace("/layers/linear.py", "/layers/fused.py").replace("code=", "code=0")
    [left], [right] = logged(text), logged(other)
    found = compare_keys(left, right)
    assert names(found) == ["vllm.code.hash"]
    assert noted(found, "layers/fused.py, vllm/model_executor/layers/linear.py")
    assert noted(found, "graphs: not compared")


def test_another_release_is_told_by_its_variables(vllm_start: Any, stored: Any) -> None:
    env = {
        k: v for k, v in vllm_start.env.items() if k not in ("VLLM_XLA_CACHE_PATH", "VLLM_API_KEY")
    }
    env |= {"VLLM_ENABLE_HPC_OPS": False}
    del env["VLLM_NIXL_SIDE_CHANNEL_HOST"]
    later = type(vllm_start)(env=env, config="f" * 10)
    found = compare_keys(stored(vllm_start), stored(later))
    assert names(found)[0] == "vllm.config.hash"
    assert {c.kind for c in found.changes[1:]} == {"added", "removed"}
    assert noted(found, "two releases of vLLM: a is after 0.15, before 0.24; b is after 0.28")


def test_a_difference_outside_of_the_dump_is_a_difference(vllm_start: Any, logged: Any) -> None:
    texts = [vllm_start.change(env={"VLLM_XGRAMMAR_CACHE_MB": size}).log() for size in (512, 1024)]
    [left], [right] = (logged(text[: text.index("'VLLM_USE_DEEP_GEMM'")]) for text in texts)
    change = only(compare_keys(left, right))
    assert (change.group, change.name, change.klass) == ("vllm.env", "hash", "unknown")
    assert "not recorded on both sides" in change.note


def test_what_one_side_does_not_record_is_no_difference(
    vllm_start: Any, stored: Any, logged: Any
) -> None:
    text = vllm_start.log()
    [hashes_alone] = logged(text[: text.index("Compile env factors")])
    found = compare_keys(hashes_alone, stored(vllm_start))
    assert found.changes == ()
    assert found.same == 3
    assert noted(found, "one side does not record them: CMAKE_BUILD_TYPE, CUDA_HOME")
    [cut] = logged(text[: text.index("'VLLM_DP_RANK'")])
    assert compare_keys(stored(vllm_start), cut).changes == ()


def test_keys_that_differ_in_what_is_not_recorded_differ(vllm_start: Any, stored: Any) -> None:
    whole = stored(vllm_start)
    facts = replace(whole.facts, factors=whole.facts.factors[:-1])
    found = compare_keys(whole, replace(whole, key="0123456789", facts=facts))
    assert names(found) == ["vllm.key"]
    assert noted(found, "one side does not record them: vllm.")


def test_secrets_are_not_compared_with_a_snapshot(vllm_start: Any, stored: Any) -> None:
    whole = stored(vllm_start.change(env={"VLLM_API_KEY": "hunter2"}))
    snapshot = Subject(label="", key="", facts=KeyFacts(factors=whole.facts.factors, complete=True))
    found = compare_keys(snapshot, whole)
    assert found.changes == ()
    assert noted(found, "a snapshot has no secrets: VLLM_API_KEY")


def test_a_log_and_a_cache_of_one_start_are_equal(
    vllm_start: Any, stored: Any, logged: Any
) -> None:
    [subject] = logged(vllm_start.log())
    assert compare_keys(subject, stored(vllm_start)).changes == ()


def test_keys_alone_are_compared_where_factors_are_missing(vllm_start: Any, stored: Any) -> None:
    bare = Subject(label="", key="0123456789", facts=KeyFacts())
    found = compare_keys(bare, stored(vllm_start))
    assert names(found) == ["vllm.key"]
    assert noted(found, "a has no factors")
    assert noted(compare_keys(bare, bare), "neither side has factors")
    assert compare_keys(bare, bare).changes == ()


def test_equal_factors_under_two_names_are_equal(vllm_start: Any, stored: Any) -> None:
    found = compare_keys(stored(vllm_start), stored(vllm_start, key="0123456789"))
    assert found.changes == ()
    assert noted(found, "0123456789")


def test_the_same_rank_of_both_sides_is_compared(vllm_start: Any, logged: Any) -> None:
    def engines(*ranks: int) -> str:
        return "".join(
            vllm_start.change(env={"VLLM_DP_RANK": rank}).log(
                process=f"EngineCore_DP{rank} pid={rank}", label=f"rank_0_{rank}/backbone"
            )
            for rank in ranks
        )

    left, right = logged(engines(0, 1, 2)), logged(engines(2))
    a, b, notes = like_with_like(left, right)
    assert (a.label, b.label) == ("rank_0_2/backbone", "rank_0_2/backbone")
    assert compare_keys(a, b).changes == ()
    assert notes == (
        "the keys within a differ among themselves, in VLLM_DP_RANK",
        "rank_0_2/backbone is compared, of each side that has several",
    )


def test_where_no_rank_is_on_both_sides_it_is_said(vllm_start: Any, logged: Any) -> None:
    left = logged(vllm_start.log())
    right = logged(vllm_start.log(label="rank_3_0/eagle_head"))
    a, b, notes = like_with_like(left, right)
    assert (a.label, b.label) == ("rank_0_0/backbone", "rank_3_0/eagle_head")
    assert "no rank is on both sides" in notes[0]


def test_the_last_start_in_a_log_is_taken_and_backbones_first(vllm_start: Any, logged: Any) -> None:
    older = vllm_start.change(env={"VLLM_USE_DEEP_GEMM": False})
    subjects = logged(older.log() + vllm_start.log(label="rank_0_0/a_head") + vllm_start.log())
    assert [s.label for s in subjects] == ["rank_0_0/backbone", "rank_0_0/a_head"]
    assert subjects[0].facts.environment["VLLM_USE_DEEP_GEMM"] is True
