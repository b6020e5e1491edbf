"""What vLLM itself wrote, release by release: `vllm/make.py` says how."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllmc.core.diagnose.vllm_cache import VllmCache, read_caches
from vllmc.core.diagnose.vllm_compare import cache_subjects, compare_keys, log_subjects
from vllmc.core.diagnose.vllm_factors import derived_key
from vllmc.core.diagnose.vllm_log import VllmLog, is_vllm_log, read_log

HERE = Path(__file__).parent / "vllm"


def cache(name: str) -> VllmCache:
    [found] = [c for c in read_caches(HERE / name, contents=True) if c.kind == "compile"]
    return found


def log(name: str) -> VllmLog:
    assert is_vllm_log(HERE / name)
    return read_log(HERE / name)


@pytest.mark.parametrize(
    ("name", "release", "count"),
    [
        ("0.33", "after 0.32", 245),
        ("0.33-pieces", "after 0.32", 245),
        ("0.28-pieces", "after 0.24, before 0.29", 233),
    ],
)
def test_the_key_of_a_cache_is_made_of_what_is_recorded(
    name: str, release: str, count: int
) -> None:
    found = cache(name)
    assert found.main is not None
    assert derived_key(found.main.facts) == found.key
    assert found.main.facts.complete
    assert (found.release, len(found.main.facts.environment)) == (release, count)
    assert found.notes == ()


@pytest.mark.parametrize("name", ["0.33-pieces", "0.28-pieces", "0.11"])
def test_pieces_ranges_and_artifacts_are_found(name: str) -> None:
    found = cache(name)
    main = found.main
    assert main is not None
    assert main.graph is not None
    assert main.graph.pieces == tuple(f"submod_{number}" for number in range(7))
    assert "/app/model.py" in main.graph.sources
    assert main.ranges == (("any",) if name == "0.11" else ("1:2048",))
    assert [artifact.piece for artifact in main.artifacts] == [0, 1, 2, 3]
    assert [entry.piece for entry in main.index.entries] == [0, 1, 2, 3]
    assert main.index.unknown == 0
    assert main.places.moved


def test_a_release_before_factors_were_recorded_is_told() -> None:
    found = cache("0.11")
    assert found.notes == (
        "rank_0_0/backbone: there is no cache_key_factors.json: vLLM before 0.12 writes none",
    )
    [dump] = log("0.11/start.log").dumps
    assert (dump.key, dump.label) == (found.key, "rank_0_0/backbone")
    assert dump.sources[0] == "/app/model.py"
    assert not dump.facts.factors


def test_a_whole_model_lies_beside_the_graph_it_was_made_of() -> None:
    kinds = {c.kind: c for c in read_caches(HERE / "0.33")}
    assert set(kinds) == {"compile", "aot"}
    assert re.fullmatch(r"[0-9a-f]{64}", kinds["aot"].key)
    assert kinds["compile"].artifacts == ()


@pytest.mark.parametrize("name", ["0.33", "0.33-pieces", "0.28-pieces"])
def test_a_start_s_log_has_the_factors_of_its_cache(name: str) -> None:
    told = log(f"{name}/start.log")
    assert told.notes == ()
    [dump] = told.dumps
    assert dump.facts.complete
    assert "/site/torch/nn/modules/linear.py" in dump.sources
    compared = compare_keys(cache_subjects(cache(name))[0], log_subjects(told)[0])
    assert compared.changes == ()


def test_a_hit_dumps_factors_again_but_for_a_whole_model() -> None:
    assert [dump.key for dump in log("0.33-pieces/again.log").dumps] == [cache("0.33-pieces").key]
    whole = log("0.33/again.log")
    assert whole.dumps == ()
    [path] = whole.loaded
    assert path.endswith("/rank_0_0/model")


def test_why_a_stored_model_was_not_used_is_told() -> None:
    changed = log("0.33/changed.log")
    [note] = changed.notes
    assert note.endswith(
        "a stored model could not be used: Source code has changed since the last compilation. "
        "Recompiling the model."
    )
    [before], [after] = (log_subjects(side) for side in (log("0.33/start.log"), changed))
    assert [c.group for c in compare_keys(before, after).changes] == ["vllm.code"]


def test_an_option_of_vllm_is_named_between_two_real_caches() -> None:
    sides = (cache_subjects(cache(name))[0] for name in ("0.33", "0.33-pieces"))
    changes = compare_keys(*sides).changes
    assert {(c.name, c.before, c.after) for c in changes if c.group == "vllm.env"} == {
        ("VLLM_USE_AOT_COMPILE", True, False),
        ("VLLM_USE_MEGA_AOT_ARTIFACT", True, False),
    }


def test_two_releases_are_told_apart() -> None:
    sides = (cache_subjects(cache(name))[0] for name in ("0.28-pieces", "0.33-pieces"))
    notes = compare_keys(*sides).notes
    assert any(note.startswith("two releases of vLLM: a is after 0.24") for note in notes)
