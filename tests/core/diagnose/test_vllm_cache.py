from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmc.core.diagnose.vllm_cache import VllmCache, duplicates, read_caches
from vllmc.core.diagnose.vllm_compare import cache_subjects, compare_keys
from vllmc.core.diagnose.vllm_layout import is_vllm_cache
from vllmc.core.errors import VllmcError

BACKBONE = "rank_0_0/backbone"


def one(path: Path) -> VllmCache:
    [cache] = read_caches(path, contents=True)
    return cache


@pytest.mark.parametrize("level", ["", "..", "../..", "rank_0_0", BACKBONE])
def test_a_cache_is_found_from_every_level(tmp_path: Path, vllm_start: Any, level: str) -> None:
    directory = vllm_start.store(tmp_path / "vllm")
    path = directory / level
    assert is_vllm_cache(path)
    cache = one(path)
    assert (cache.kind, cache.key) == ("compile", vllm_start.key)
    assert [c.label for c in cache.compilations] == [BACKBONE]
    assert cache.release == "after 0.15, before 0.24"
    assert cache.notes == ()


def test_another_directory_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "src/pkg").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    assert not is_vllm_cache(tmp_path)
    with pytest.raises(VllmcError) as caught:
        read_caches(tmp_path)
    assert caught.value.code == "no-vllm-cache"


def test_a_compilation_has_its_factors_graph_ranges_and_artifacts(
    tmp_path: Path, vllm_start: Any
) -> None:
    cache = one(vllm_start.change(ranges=((1, 8192), (8193, 16384))).store(tmp_path))
    main = cache.main
    assert main is not None
    assert main.facts.environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.3.17"
    assert main.graph is not None
    assert len(main.graph.pieces) == 7
    assert main.ranges == ("1:8192", "8193:16384")
    assert [(a.piece, a.range) for a in main.artifacts[:3]] == [
        (0, "1:8192"),
        (0, "8193:16384"),
        (1, "1:8192"),
    ]
    assert cache.bytes > sum(artifact.bytes for artifact in cache.artifacts)


def test_identical_artifacts_are_counted(tmp_path: Path, vllm_start: Any) -> None:
    # As in a published cache of a model of 16 layers: 14 of 17 artifacts are one.
    artifacts = (b"a" * 1000, b"b" * 900, *[b"c" * 500] * 14, b"d" * 100)
    cache = one(vllm_start.change(artifacts=artifacts).store(tmp_path))
    found = duplicates(cache.artifacts)
    assert (found.artifacts, found.unique, found.bytes) == (17, 4, 13 * 500)


def test_unpacked_artifacts_are_directories(tmp_path: Path, vllm_start: Any) -> None:
    place = vllm_start.store(tmp_path) / BACKBONE
    for piece in (1, 2):
        name = place / f"artifact_compile_range_1_8192_subgraph_{piece}"
        name.unlink()
        (name / "6i").mkdir(parents=True)
        (name / "6i/c6i.py").write_bytes(b"code")
    cache = one(place)
    assert duplicates(cache.artifacts).unique == 3
    assert cache.notes == ()


def test_a_moved_cache_is_told_by_its_handles(tmp_path: Path, vllm_start: Any) -> None:
    here = one(vllm_start.store(tmp_path / "here")).main
    there = one(vllm_start.store(tmp_path / "there", written_in="/root/.cache/vllm")).main
    assert here is not None
    assert there is not None
    assert not here.places.moved
    assert there.places.moved
    assert there.places.handles == (
        f"/root/.cache/vllm/torch_compile_cache/{vllm_start.key}/{BACKBONE}",
    )


def test_directories_mentioned_in_artifacts_are_counted(tmp_path: Path, vllm_start: Any) -> None:
    mention = b"\x8c\x30/tmp/torchinductor_root/ab/cab.py"
    main = one(vllm_start.change(artifacts=(mention, mention + b"!", b"x")).store(tmp_path)).main
    assert main is not None
    assert main.places.artifacts == (("/tmp/torchinductor_root", 2),)


def test_several_ranks_and_parts_are_in_their_order(tmp_path: Path, vllm_start: Any) -> None:
    for label in ("rank_10_0/backbone", "rank_2_0/eagle_head", "rank_2_0/backbone"):
        directory = vllm_start.store(tmp_path, label=label)
    assert [c.label for c in one(directory).compilations] == [
        "rank_2_0/backbone",
        "rank_2_0/eagle_head",
        "rank_10_0/backbone",
    ]
    assert [c.label for c in one(directory / "rank_10_0").compilations] == ["rank_10_0/backbone"]


def test_several_keys_are_the_oldest_first(tmp_path: Path, vllm_start: Any) -> None:
    ages = {}
    for age, host in enumerate(("c", "a", "b")):
        directory = vllm_start.change(env={"VLLM_NIXL_SIDE_CHANNEL_HOST": host}).store(tmp_path)
        os.utime(directory, (1000 - age, 1000 - age))
        ages[directory.name] = age
    assert [ages[cache.key] for cache in read_caches(tmp_path)] == [2, 1, 0]


@pytest.mark.parametrize("root", ["torch_aot_compile", "torch_compile_cache/torch_aot_compile"])
def test_a_whole_model_s_tree_has_no_factors(tmp_path: Path, root: str) -> None:
    for rank in ("rank_0_0", "rank_1_0"):
        place = tmp_path / root / ("ab" * 32) / rank
        place.mkdir(parents=True)
        (place / "model").write_bytes(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.")
    (tmp_path / root / ("ab" * 32) / "inductor_cache").mkdir()
    cache = one(tmp_path)
    assert (cache.kind, cache.key) == ("aot", "ab" * 32)
    assert [c.label for c in cache.compilations] == ["rank_0_0", "rank_1_0"]
    assert all(not c.facts.factors for c in cache.compilations)
    assert duplicates(cache.artifacts).unique == 1
    assert dict(cache.stores) == {"inductor_cache": 0}
    assert "no factors" in cache.notes[0]


def test_a_release_without_factors_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    # vLLM 0.11, with the older compiler; before prefixes there were.
    rank = tmp_path / "torch_compile_cache/18abfd6fb8/rank_0_0"
    (rank / "inductor_cache/ab").mkdir(parents=True)
    (rank / "inductor_cache/ab/cab.py").write_text("code")
    (rank / "computation_graph.py").write_text("class GraphModule: pass\n")
    (rank / "vllm_compile_cache.py").write_text("{(None, 0, 'inductor'): ('h', '/old/cab.py')}")
    cache = one(tmp_path)
    assert (cache.key, cache.release) == ("18abfd6fb8", "")
    assert cache.main is not None
    assert cache.main.label == "rank_0_0"
    assert cache.main.ranges == ("any",)
    assert dict(cache.stores) == {"inductor_cache": 4}
    assert cache.notes == (
        "rank_0_0: there is no cache_key_factors.json: vLLM before 0.12 writes none",
    )


def test_a_renamed_directory_does_not_have_the_key_of_its_factors(
    tmp_path: Path, vllm_start: Any
) -> None:
    [note] = one(vllm_start.store(tmp_path, key="0123456789")).notes
    assert vllm_start.key in note
    assert "0123456789" in note


def test_a_directory_with_a_name_of_its_own_need_not_be_a_key(
    tmp_path: Path, vllm_start: Any
) -> None:
    assert one(vllm_start.store(tmp_path, key="llama-70b")).notes == ()


def test_a_rank_with_other_factors_is_named(tmp_path: Path, vllm_start: Any) -> None:
    vllm_start.store(tmp_path)
    other = vllm_start.change(env={"VLLM_DP_RANK": 1})
    directory = other.store(tmp_path, key=vllm_start.key, label="rank_1_0/backbone")
    assert one(directory).notes == (f"rank_1_0/backbone records other factors than {BACKBONE}",)


def factors_file(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        path = place / "cache_key_factors.json"
        value = json.loads(path.read_text())
        changed = change(value)
        path.write_text(json.dumps(value if changed is None else changed))

    return damage


def replaced(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda place: (place / name).write_bytes(data) and None


def dangling(place: Path) -> None:
    path = place / "vllm_compile_cache.py"
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (factors_file(lambda v: v.update(schema=3, more={})), "left out: more, schema"),
        (factors_file(lambda v: v.pop("env") and None), "environment's factors are missing"),
        (factors_file(lambda v: v.update(env=[1])), "environment's factors are missing"),
        (factors_file(lambda v: v.update(code_hash=3)), "no hash of the code"),
        (factors_file(lambda v: [v]), "a list where an object belongs"),
        (replaced("cache_key_factors.json", b'{"env": {"A'), "no JSON, at line 1"),
        (replaced("cache_key_factors.json", b"\x00\xff"), "no UTF-8 text"),
        (replaced("vllm_compile_cache.py", b"{((1, 8192), 0, 'ind"), "no Python literal"),
        (replaced("vllm_compile_cache.py", b"__import__('os')"), "no Python literal"),
        (replaced("vllm_compile_cache.py", b"{1: 2}"), "1 entries were not understood"),
        (replaced("computation_graph.py", b"\xff"), "no UTF-8 text"),
        (dangling, "No such file"),
        (lambda place: (place / "computation_graph.py").unlink(), "No such file"),
        (lambda place: os.mkfifo(place / "artifact_shape_1_subgraph_0"), "no plain file"),
    ],
)
def test_what_is_not_understood_is_said_and_the_rest_is_read(
    tmp_path: Path, vllm_start: Any, damage: Callable[[Path], None], note: str
) -> None:
    directory = vllm_start.store(tmp_path)
    damage(directory / BACKBONE)
    cache = one(directory)
    assert any(note in line for line in cache.notes), cache.notes
    assert len(cache.artifacts) == 4


def test_a_cache_without_an_index_is_whole(tmp_path: Path, vllm_start: Any) -> None:
    directory = vllm_start.change(artifacts=()).store(tmp_path)
    (directory / BACKBONE / "vllm_compile_cache.py").unlink()
    assert one(directory).notes == ()


@pytest.fixture(scope="module")
def damaged_place() -> Any:
    with tempfile.TemporaryDirectory() as root:
        yield Path(root)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_damage_to_any_file_makes_reading_fail(
    damaged_place: Path, vllm_start_class: Any, data: st.DataObject
) -> None:
    start = vllm_start_class()
    shutil.rmtree(damaged_place / "cache", ignore_errors=True)
    directory = start.store(damaged_place / "cache")
    whole = cache_subjects(one(directory))[0]
    path = data.draw(st.sampled_from(sorted(p for p in directory.rglob("*") if p.is_file())))
    contents = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(contents) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            contents[at] ^= data.draw(st.integers(1, 255))
        elif kind == "insert":
            contents[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        elif at:
            del contents[at:]
    path.write_bytes(contents)
    damaged = one(directory)
    compare_keys(whole, cache_subjects(damaged)[0])
    json.dumps([factor.to_json() for factor in cache_subjects(damaged)[0].facts.factors])
