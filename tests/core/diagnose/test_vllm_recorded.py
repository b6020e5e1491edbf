"""What vllmc's plugin wrote beside vLLM's own entries: `vllm/make.py` says how they were made."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vllmc.core.cache.explain import Change
from vllmc.core.cache.key import REDACTED
from vllmc.core.diagnose.foreign_files import Unreadable
from vllmc.core.diagnose.vllm_cache import VllmCache, read_caches
from vllmc.core.diagnose.vllm_compare import KeyComparison, cache_subjects, compare_keys
from vllmc.core.diagnose.vllm_factors import HASHES, derived_key
from vllmc.core.diagnose.vllm_prediction import foresee, not_known
from vllmc.core.diagnose.vllm_recorded import Start, read_recorded, read_start

HERE = Path(__file__).parent / "vllm" / "0.33-fields"
CONFIG, CODE, COMPILER = HASHES.values()


def cache(place: Path, kind: str = "compile") -> VllmCache:
    [found] = [c for c in read_caches(place) if c.kind == kind]
    return found


def compared(before: Path, after: Path, kind: str = "compile") -> KeyComparison:
    return compare_keys(*(cache_subjects(cache(place, kind))[0] for place in (before, after)))


def written(place: Path) -> Path:
    [path] = place.rglob("vllmc_factors.json")
    return path


def changed(place: Path, tmp_path: Path, **values: Any) -> Path:
    """A copy of a directory of which the file of the plugin's says something else."""
    shutil.copytree(place, tmp_path / "copy")
    path = written(tmp_path / "copy")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("case", "group", "name", "before", "after", "restore"),
    [
        (
            *("variable", "vllm.env", "VLLM_USE_LAYERNAME", True, False),
            "export VLLM_USE_LAYERNAME=1",
        ),
        (
            *("config", CONFIG, "scheduler_config.max_num_batched_tokens", 2048, 1024),
            "--max-num-batched-tokens 2048",
        ),
        ("option", COMPILER, "inductor.max_autotune", False, True, ""),
    ],
)
def test_one_changed_setting_of_two_real_starts_is_named(
    case: str, group: str, name: str, before: Any, after: Any, restore: str
) -> None:
    [change] = compared(HERE / "base", HERE / case).changes
    assert (change.group, change.name) == (group, name)
    assert (change.before, change.after, change.restore) == (before, after, restore)
    assert change.affects_key


def option_changed(
    tmp_path: Path, before: dict[str, str] | None, after: dict[str, str] | None
) -> Change:
    """The change of the option between two starts with these variables of torch's recorded."""
    places = []
    for case, variables in (("base", before), ("option", after)):
        values = {} if variables is None else {"variables": variables}
        places.append(changed(HERE / case, tmp_path / case, **values))
    found = [c for c in compared(*places).changes if c.affects_key]
    [change] = found
    return change


THREADS = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
AUTOTUNE = {"TORCHINDUCTOR_MAX_AUTOTUNE": "1"}


def test_the_variable_that_set_an_option_is_named_and_how_to_undo_it(tmp_path: Path) -> None:
    change = option_changed(tmp_path, THREADS, THREADS | AUTOTUNE)
    assert change.note == "an option of Inductor: set by TORCHINDUCTOR_MAX_AUTOTUNE"
    assert (change.origin_before, change.origin_after) == (
        "probe",
        "env:TORCHINDUCTOR_MAX_AUTOTUNE",
    )
    assert change.restore == "unset TORCHINDUCTOR_MAX_AUTOTUNE"


def test_the_variable_of_the_first_side_is_set_again_as_it_was(tmp_path: Path) -> None:
    change = option_changed(tmp_path, THREADS | {"TORCHINDUCTOR_MAX_AUTOTUNE": "a b"}, THREADS)
    assert change.origin_before == "env:TORCHINDUCTOR_MAX_AUTOTUNE"
    assert change.restore == "export TORCHINDUCTOR_MAX_AUTOTUNE='a b'"


def test_a_variable_that_is_the_same_set_nothing(tmp_path: Path) -> None:
    change = option_changed(tmp_path, THREADS | AUTOTUNE, THREADS | AUTOTUNE)
    assert "set by code" in change.note
    assert "TORCHINDUCTOR_MAX_AUTOTUNE is the same" in change.note
    assert (change.restore, change.origin_after) == ("", "probe")


def test_without_recorded_variables_what_may_have_set_it_is_said(tmp_path: Path) -> None:
    change = option_changed(tmp_path, None, THREADS | AUTOTUNE)
    assert change.note.endswith("set by TORCHINDUCTOR_MAX_AUTOTUNE or code that ran before")
    assert change.restore == ""


def test_a_secret_variable_is_not_given_back(tmp_path: Path) -> None:
    hidden = {"TORCHINDUCTOR_MAX_AUTOTUNE": REDACTED}
    assert option_changed(tmp_path, THREADS | hidden, THREADS).restore == ""


def test_what_vllm_sets_itself_is_traced_to_its_own_setting(tmp_path: Path) -> None:
    recorded = json.loads(written(HERE / "option").read_text())
    compiler = recorded["compiler"] | {
        "inductor.assume_32bit_indexing": True,
        "inductor.max_autotune": False,
    }
    place = changed(HERE / "option", tmp_path, compiler=compiler)
    [change] = compared(HERE / "base", place).changes
    assert "dynamic_shapes_config.assume_32_bit_indexing of --compilation-config" in change.note


@pytest.mark.parametrize(
    ("option", "after", "restore"),
    [
        ("cpp.dynamic_threads", False, {"cpp.dynamic_threads": True}),
        ("combo_kernels", True, "leave combo_kernels out of --compilation-config"),
    ],
)
def test_an_option_that_vllm_hands_to_inductor_is_given_back_under_its_whole_name(
    tmp_path: Path, option: str, after: Any, restore: Any
) -> None:
    table = "compilation_config.inductor_compile_config"
    recorded = json.loads(written(HERE / "config").read_text())
    base = json.loads(written(HERE / "base").read_text())["config"]
    config = base | {table: base[table] | {option: after}}
    place = changed(HERE / "config", tmp_path, config=config, hashes=recorded["hashes"])
    [change] = compared(HERE / "base", place).changes
    assert (change.name, change.after) == (f"{table}.{option}", after)
    assert "what vLLM hands to Inductor" in change.note
    if isinstance(restore, dict):
        restore = f"--compilation-config '{json.dumps({'inductor_compile_config': restore})}'"
    assert change.restore == restore


def test_a_changed_source_is_named_of_either_tree() -> None:
    for before, after, kind in (("base", "source", "compile"), ("whole", "whole-source", "aot")):
        [change] = compared(HERE / before, HERE / after, kind).changes
        assert (change.group, change.name, change.kind) == (CODE, "model.py", "changed")
        assert "its contents differ" in change.note


def test_what_is_recorded_makes_vllm_s_own_key_in_both_releases() -> None:
    for place in (HERE / "base", HERE.parent / "0.32-fields" / "base"):
        found = cache(place)
        assert found.main is not None
        assert not any("vllmc_factors" in note for note in found.notes)
        assert derived_key(found.main.facts) == found.key
        recorded = read_recorded(written(place).read_text())
        assert recorded.rebuilds
        assert recorded.unread == ()
        assert recorded.key == found.key


def test_the_release_is_the_recorded_one_not_a_guess_by_variables(tmp_path: Path) -> None:
    for release in ("0.32", "0.33"):
        assert cache(HERE.parent / f"{release}-fields" / "base").release.startswith(f"{release}.")
    written(shutil.copytree(HERE / "base", tmp_path / "copy")).unlink()
    assert cache(tmp_path / "copy").release == "after 0.32"


def test_a_tree_of_whole_models_has_factors_too() -> None:
    found = cache(HERE / "whole", "aot")
    assert found.main is not None
    values = {f.identity: f.value for f in found.main.facts.fields}
    assert str(values[CODE, "forward"]).startswith("Model.forward, line ")
    assert len(found.main.facts.environment) == 245
    assert not any("records no factors" in note for note in found.notes)


def test_two_releases_differ_in_the_version_and_what_it_brings() -> None:
    found = compared(HERE.parent / "0.32-fields" / "base", HERE / "base")
    named = {(c.group, c.name): (c.before, c.after) for c in found.changes}
    assert named[CONFIG, "version"] == ("0.32.0", "0.33.0")
    assert (COMPILER, "torch_key") not in named


def test_fields_of_another_start_are_left_out(tmp_path: Path) -> None:
    recorded = json.loads(written(HERE / "base").read_text())
    hashes = recorded["hashes"] | {"config": "0123456789"}
    found = cache(changed(HERE / "base", tmp_path, hashes=hashes))
    assert found.main is not None
    assert found.main.facts.fields == ()
    assert any("of another start" in note for note in found.notes)


def test_a_hash_that_no_field_accounts_for_is_said(tmp_path: Path) -> None:
    shutil.copytree(HERE / "base", tmp_path / "base")
    path = written(tmp_path / "base")
    recorded = json.loads(path.read_text())
    recorded["hashes"]["config"] = "0123456789"
    path.write_text(json.dumps(recorded))
    own = path.with_name("cache_key_factors.json")
    own.write_text(json.dumps(json.loads(own.read_text()) | {"config_hash": "0123456789"}))
    [change] = compared(HERE / "base", tmp_path / "base").changes
    assert (change.group, change.name) == (CONFIG, "hash")
    assert "none differs" in change.note


def test_one_side_without_fields_is_compared_by_hashes(tmp_path: Path) -> None:
    shutil.copytree(HERE / "config", tmp_path / "config")
    written(tmp_path / "config").unlink()
    [change] = compared(HERE / "base", tmp_path / "config").changes
    assert (change.group, change.name) == (CONFIG, "hash")
    assert "vllmc, installed beside vLLM" in change.note


def test_what_could_not_be_read_is_said(tmp_path: Path) -> None:
    place = changed(HERE / "base", tmp_path, rebuilds=False, not_read=["vLLM 0.99 is not known"])
    notes = cache(place).notes
    assert any(note.endswith("not recorded: vLLM 0.99 is not known") for note in notes)
    assert any("do not make vLLM's key" in note for note in notes)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "vllmc-vllm-factors", "version": 2}', '{"format": 1}']
)
def test_a_file_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(Unreadable):
        read_recorded(text)


@pytest.mark.parametrize("name", ["env", "config", "compiler", "sources", "hashes", "hidden"])
def test_a_damaged_part_is_left_out(name: str) -> None:
    recorded = json.loads(written(HERE / "base").read_text())
    for damaged in (None, [1, {"name": 3}], "x", {"a": None}):
        assert read_recorded(json.dumps(recorded | {name: damaged})).key == recorded["key"]


def test_two_secrets_are_told_to_differ_and_never_shown(tmp_path: Path) -> None:
    recorded = json.loads(written(HERE / "base").read_text())
    sides = []
    for digest in ("a" * 64, "b" * 64):
        values = {
            "env": recorded["env"] | {"VLLM_SECRET": REDACTED},
            "hidden": {"env.VLLM_SECRET": digest},
        }
        facts = read_recorded(json.dumps(recorded | values)).facts
        assert facts.secrets == ("VLLM_SECRET",)
        sides.append(facts)
    assert dict(sides[0].hidden) != dict(sides[1].hidden)


def start(case: str, **values: Any) -> Start:
    """The start that left a recorded directory, asked about beforehand."""
    recorded = json.loads(written(HERE / case).read_text())
    for name in ("sources", "key", "tree", "rebuilds"):
        del recorded[name]
    del recorded["hashes"]["code"]
    recorded["compilation"]["mode"] = "VLLM_COMPILE"
    asked = {"model": "toy", "ranks": ["rank_0_0"], "trees": ["compile"], "disabled": ""}
    return read_start(json.dumps(recorded | asked | values))


def sourced(tmp_path: Path, *, contents: str | None) -> Path:
    """The base's cache, with its sources where they can be read, and an artifact."""
    file = tmp_path / "app" / "model.py"
    file.parent.mkdir()
    file.write_text("x = 1\n")
    digest = hashlib.sha256(b"x = 1\n").hexdigest()
    sources = [{"name": "model.py", "root": str(file.parent), "digest": digest}]
    place = changed(HERE / "base", tmp_path, sources=sources)
    written(place).with_name("artifact_compile_range_1_2048_subgraph_0").write_bytes(b"-")
    if contents is None:
        file.unlink()
    else:
        file.write_text(contents)
    return place


def test_the_same_start_would_hit(tmp_path: Path) -> None:
    found = foresee(start("base"), read_caches(sourced(tmp_path, contents="x = 1\n")))
    assert (found.outcome, found.changes) == ("would-hit", ())
    assert found.key == cache(HERE / "base").key


@pytest.mark.parametrize("contents", ["x = 2\n", None])
def test_a_start_after_a_source_changed_would_miss(tmp_path: Path, contents: str | None) -> None:
    found = foresee(start("base"), read_caches(sourced(tmp_path, contents=contents)))
    assert found.outcome == "would-miss"
    assert [(c.group, c.name) for c in found.changes] == [(CODE, "model.py")]


@pytest.mark.parametrize("case", ["variable", "config", "option"])
def test_another_start_would_miss_by_its_setting(tmp_path: Path, case: str) -> None:
    found = foresee(start(case), read_caches(sourced(tmp_path, contents="x = 1\n")))
    assert found.outcome == "would-miss"
    assert len(found.changes) == 1


@pytest.mark.parametrize("other", ["rank_1_0", "rank_0_1"])
def test_a_rank_or_replica_of_which_nothing_is_stored_would_miss(
    tmp_path: Path, other: str
) -> None:
    place = sourced(tmp_path, contents="x = 1\n")
    asked = start("base", ranks=["rank_0_0", other])
    found = foresee(asked, read_caches(place))
    assert found.outcome == "would-miss"
    assert found.reason == f"there is nothing of {other} in the entry"
    [rank] = place.rglob("rank_0_0")
    shutil.copytree(rank, rank.with_name(other))
    assert foresee(asked, read_caches(place)).outcome == "would-hit"


def beside(place: Path, name: str, **values: Any) -> Path:
    """Has a copy of the backbone stand beside it for another part, of which other is recorded."""
    [backbone] = place.rglob("backbone")
    path = written(shutil.copytree(backbone, backbone.with_name(name)))
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return path


def test_a_part_that_vllm_would_run_of_changed_sources_is_no_hit(tmp_path: Path) -> None:
    place = sourced(tmp_path, contents="x = 1\n")
    draft = tmp_path / "app" / "draft.py"
    draft.write_text("y = 1\n")
    digest = hashlib.sha256(b"y = 1\n").hexdigest()
    sources = [{"name": "draft.py", "root": str(draft.parent), "digest": digest}]
    recorded = json.loads(written(place).read_text())
    # The directory is the backbone's, so the hash of the draft's code is another.
    hashes = recorded["hashes"] | {"code": "0" * 64}
    path = beside(place, "eagle_head", sources=sources, hashes=hashes)
    own = path.with_name("cache_key_factors.json")
    own.write_text(json.dumps(json.loads(own.read_text()) | {"code_hash": "0" * 64}))
    assert foresee(start("base"), read_caches(place)).outcome == "would-hit"
    draft.write_text("y = 2\n")
    found = foresee(start("base"), read_caches(place))
    assert found.outcome == "unknown"
    assert "stored of eagle_head, whose sources changed" in found.reason


def test_an_entry_that_its_encoder_names_is_judged_by_the_encoder_s_sources(
    tmp_path: Path,
) -> None:
    place = sourced(tmp_path, contents="x = 1\n")
    beside(place, "encoder")
    [main] = place.rglob("backbone/vllmc_factors.json")
    recorded = json.loads(main.read_text())
    main.write_text(
        json.dumps(recorded | {"hashes": recorded["hashes"] | {"code": "0" * 64}, "sources": []})
    )
    own = main.with_name("cache_key_factors.json")
    own.write_text(json.dumps(json.loads(own.read_text()) | {"code_hash": "0" * 64}))
    assert foresee(start("base"), read_caches(place)).outcome == "would-hit"
    (tmp_path / "app" / "model.py").write_text("x = 2\n")
    found = foresee(start("base"), read_caches(place))
    assert (found.outcome, [c.name for c in found.changes]) == ("would-miss", ["model.py"])


def whole(tmp_path: Path, forward: str, contents: str) -> Path:
    """A whole model's entry for one function, whose one source is beside it."""
    root = tmp_path / forward
    root.mkdir()
    (root / "model.py").write_text(contents)
    digest = hashlib.sha256(b"x = 1\n").hexdigest()
    sources = [{"name": "model.py", "root": str(root), "digest": digest}]
    shutil.copytree(HERE / "whole", root / "cache")
    [path] = (root / "cache").rglob("torch_aot_compile/**/vllmc_factors.json")
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"sources": sources, "forward": f"{forward}, line 7"}
        )
    )
    path.with_name("model").write_bytes(b"-")
    return root / "cache"


def test_of_a_model_in_several_functions_each_must_be_there(tmp_path: Path) -> None:
    [recorded] = (HERE / "whole").rglob("torch_aot_compile/**/vllmc_factors.json")
    kept = {n: json.loads(recorded.read_text())[n] for n in ("env", "config", "compiler", "hashes")}
    asked = start("base", **kept, trees=["aot"])
    one = read_caches(whole(tmp_path, "Model.forward", "x = 1\n"))
    other = read_caches(whole(tmp_path, "Draft.forward", "x = 2\n"))
    assert foresee(asked, one).outcome == "would-hit"
    for caches in ((*one, *other), (*other, *one)):
        assert foresee(asked, caches).outcome == "would-miss"
    # An older entry of a function that has a newer one is none of them.
    older = read_caches(whole(tmp_path / "Model.forward", "Model.forward", "x = 2\n"))
    assert foresee(asked, (*older, *one)).outcome == "would-hit"


def test_what_is_compiled_beside_the_model_is_said_not_to_be_known() -> None:
    general = not_known(start("base"))
    [more] = set(not_known(start("base", beside=["the draft model (eagle)"]))) - set(general)
    assert more.startswith("whether the draft model (eagle) is stored")


def test_what_cannot_be_known_is_unknown(tmp_path: Path) -> None:
    place = sourced(tmp_path, contents="x = 1\n")
    disabled = "VLLM_DISABLE_COMPILE_CACHE"
    off = foresee(start("base", disabled=disabled), read_caches(place))
    assert off.outcome == "unknown"
    assert "VLLM_DISABLE_COMPILE_CACHE" in off.reason
    written(place).unlink()
    unrecorded = foresee(start("base"), read_caches(place))
    assert unrecorded.outcome == "unknown"
    assert "which they are is not recorded" in unrecorded.reason
    assert foresee(start("base"), ()).outcome == "would-miss"


def test_what_vllm_has_against_the_arguments_is_passed_on() -> None:
    with pytest.raises(Unreadable, match="no such model"):
        read_start('{"error": "ValueError: no such model"}')
