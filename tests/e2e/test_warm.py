from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from caches import stored

Run = Callable[..., Any]
Flip = Callable[[Path, str], None]
HEX64 = re.compile(r"[0-9a-f]{64}")


def outcomes(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(unit["pieces"][0], unit["outcome"]) for unit in row["units"]]


def changed(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(change["group"], change["name"]) for change in row["miss"]["changes"]]


def check_shape(row: dict[str, Any]) -> None:
    assert HEX64.fullmatch(row["key"])
    for unit in row["units"]:
        assert HEX64.fullmatch(unit["artifact"])
        assert unit["bytes"] > 0
        assert unit["range"]
    assert set(row["seconds"]) == {"total", "capture", "compile", "store"}
    assert row["peak_rss_mb"] > 10


def test_warm_compiles_what_is_missing_and_then_finds_it(eager: Run) -> None:
    first = eager("warm", "--json").json
    assert (first["command"], first["model"]) == ("warm", "tiny-llama")
    assert (first["outcome"], first["program"]) == ("compiled", "miss")
    assert first["pieces"] == {"total": 5, "splitting": 2, "compilable": 3, "unique": 3}
    assert first["counts"] == {"hit": 0, "dup": 0, "compiled": 3}
    assert [unit["range"] for unit in first["units"]] == ["1:8192"] * 3
    assert first["miss"] == {"nearest_key": None, "nearest_model": None, "changes": []}
    check_shape(first)
    second = eager("warm", "--json").json
    assert (second["outcome"], second["program"]) == ("hit", "hit")
    assert second["counts"] == {"hit": 3, "dup": 0, "compiled": 0}
    assert second["miss"] is None
    assert (second["key"], second["pieces"]) == (first["key"], first["pieces"])
    names = [[(u["pieces"], u["artifact"]) for u in row["units"]] for row in (first, second)]
    assert names[0] == names[1]
    check_shape(second)


@pytest.mark.slow
def test_inductor_s_artifacts_are_found_by_another_process(inductor_cache: Any, vllmc: Run) -> None:
    first = inductor_cache.said
    assert first["outcome"] == "compiled"
    assert first["counts"] == {"hit": 0, "dup": 0, "compiled": 3}
    check_shape(first)
    second = vllmc("warm", "--json", "--cache-dir", inductor_cache.root).json
    assert (second["outcome"], second["key"]) == ("hit", first["key"])
    assert second["seconds"]["capture"] == second["seconds"]["compile"] == 0


def test_identical_layers_share_a_unit_that_names_all_their_pieces(eager: Run) -> None:
    row = eager("warm", "--layers", "4", "--json").json
    assert row["pieces"] == {"total": 9, "splitting": 4, "compilable": 5, "unique": 3}
    assert [unit["pieces"] for unit in row["units"]] == [
        ["piece_0"],
        ["piece_2", "piece_4", "piece_6"],
        ["piece_8"],
    ]


def test_more_layers_reuse_every_unit(warmed: Any, eager: Run) -> None:
    row = eager("warm", "--layers", "5", "--json").json
    assert (row["program"], row["outcome"]) == ("miss", "hit")
    assert row["counts"] == {"hit": 3, "dup": 0, "compiled": 0}
    assert row["miss"]["nearest_key"] == warmed.said["key"]
    [change] = row["miss"]["changes"]
    assert (change["name"], change["before"], change["after"]) == ("num_hidden_layers", 2, 5)
    assert (change["origin_after"], change["affects_key"]) == ("flag", True)
    assert eager("warm", "--layers", "5", "--json").json["program"] == "hit"


def test_a_model_with_the_same_layers_reuses_their_units(factory: Path, eager: Run) -> None:
    assert eager("warm", "factory:small", "--json").json["outcome"] == "compiled"
    row = eager("warm", "factory:other_vocabulary", "--json").json
    assert (row["program"], row["outcome"]) == ("miss", "partial")
    # The pieces that touch the vocabulary have other shapes, which eager's code does not show.
    assert outcomes(row) == [("piece_0", "dup"), ("piece_2", "hit"), ("piece_4", "dup")]


def test_each_range_and_size_is_a_unit(eager: Run) -> None:
    shapes = ("--compile-range", "9:64", "--compile-range", "1:8", "--compile-size", "4")
    row = eager("warm", *shapes, "--json").json
    assert [unit["range"] for unit in row["units"]] == ["4", "1:8", "9:64"] * 3


def test_code_that_is_stored_under_another_key_is_a_dup(warmed: Any, eager: Run) -> None:
    row = eager("warm", "--compile-size", "4", "--json").json
    assert row["outcome"] == "partial"
    assert row["counts"] == {"hit": 3, "dup": 3, "compiled": 0}
    stored = {unit["artifact"] for unit in warmed.said["units"]}
    assert {unit["artifact"] for unit in row["units"]} == stored


def test_force_compiles_again_what_is_stored(warmed: Any, eager: Run) -> None:
    done = eager("warm", "--force", "--json")
    assert (done.code, done.json["outcome"], done.json["program"]) == (0, "compiled", "miss")
    assert done.json["counts"] == {"hit": 0, "dup": 0, "compiled": 3}
    assert done.json["miss"] is None
    assert "--force" in eager("warm", "--force").out
    assert eager("warm", "--json").json["outcome"] == "hit"


def test_check_says_that_a_stored_program_would_hit(warmed: Any, eager: Run) -> None:
    done = eager("warm", "--check", "--json")
    assert (done.code, done.json["outcome"]) == (0, "would-hit")
    assert done.json["pieces"] == warmed.said["pieces"]
    assert done.json["counts"] == {"hit": 3, "dup": 0, "compiled": 0}
    check_shape(done.json)


def test_check_of_an_empty_cache_would_miss_and_creates_nothing(eager: Run, cache: Path) -> None:
    done = eager("warm", "--check", "--json")
    assert (done.code, done.json["outcome"]) == (3, "would-miss")
    assert (done.json["pieces"], done.json["units"]) == (None, [])
    assert done.json["miss"] == {"nearest_key": None, "nearest_model": None, "changes": []}
    assert stored(cache) == []


def test_check_names_the_option_that_would_miss(
    warmed: Any, eager: Run, files: Callable[[Path], dict[str, bytes]]
) -> None:
    before = files(warmed.root / "v1")
    done = eager("warm", "--check", "-O", "max_autotune=true", "--json")
    assert (done.code, done.json["outcome"]) == (3, "would-miss")
    assert done.json["miss"]["nearest_key"] == warmed.said["key"]
    [change] = done.json["miss"]["changes"]
    assert (change["group"], change["name"]) == ("inductor", "max_autotune")
    assert (change["before"], change["after"], change["class"]) == (False, True, "codegen")
    assert files(warmed.root / "v1") == before


def test_check_cannot_know_whether_units_of_other_programs_serve(warmed: Any, eager: Run) -> None:
    done = eager("warm", "--check", "--layers", "3", "--json")
    assert (done.code, done.json["outcome"]) == (3, "unknown")
    assert (done.json["pieces"], done.json["units"]) == (None, [])
    assert changed(done.json) == [("model", "num_hidden_layers")]


def test_check_finds_a_corrupt_artifact_unsafe_and_leaves_it(
    warmed: Any, eager: Run, damage: Flip, files: Callable[[Path], dict[str, bytes]]
) -> None:
    damage(warmed.root, warmed.said["units"][1]["artifact"])
    before = files(warmed.root / "v1")
    done = eager("warm", "--check", "--json")
    assert (done.code, done.json["outcome"]) == (4, "unsafe")
    assert files(warmed.root / "v1") == before
    plain = eager("warm", "--check")
    assert plain.out.startswith("unsafe  corrupt-artifact: ")
    assert "cache verify" in plain.err


def test_warm_replaces_a_corrupt_artifact(
    warmed: Any, eager: Run, vllmc: Run, damage: Flip
) -> None:
    damage(warmed.root, warmed.said["units"][1]["artifact"])
    assert vllmc("cache", "verify").code == 4
    done = eager("warm", "--json")
    assert (done.code, done.json["outcome"]) == (0, "partial")
    assert outcomes(done.json) == [
        ("piece_0", "hit"),
        ("piece_2", "compiled"),
        ("piece_4", "hit"),
    ]
    assert "warning[corrupt-artifact]: " in done.err
    assert vllmc("cache", "verify").code == 0
    assert eager("warm", "--json").json["outcome"] == "hit"


def test_a_corrupt_record_is_replaced_too(warmed: Any, eager: Run) -> None:
    [record] = (warmed.root / "v1" / "programs").rglob("*.json")
    record.write_text("{")
    done = eager("warm", "--json")
    assert (done.code, done.json["program"], done.json["outcome"]) == (0, "miss", "hit")
    assert "warning[corrupt-record]: " in done.err
    assert eager("warm", "--json").json["program"] == "hit"


def test_several_models_give_one_result_each(warmed: Any, factory: Path, eager: Run) -> None:
    row = eager("warm", "tiny-llama", "factory:small", "--json").json
    assert [(r["model"], r["outcome"]) for r in row["results"]] == [
        ("tiny-llama", "hit"),
        ("factory:small", "compiled"),
    ]
    assert set(row) == {"schema_version", "command", "results"}
    both = eager("warm", "factory:small", "factory:other_vocabulary", "--check", "--json")
    assert [r["outcome"] for r in both.json["results"]] == ["would-hit", "unknown"]
    assert both.code == 3


def test_a_bad_model_in_a_list_is_found_before_anything_is_compiled(
    eager: Run, cache: Path
) -> None:
    done = eager("warm", "tiny-llama", "nonesuch")
    assert (done.code, done.error) == (1, "unknown-model")
    assert stored(cache) == []


def test_real_weights_give_the_same_key_as_none(llama_dir: Path, eager: Run) -> None:
    real = eager("warm", llama_dir, "--weights", "real", "--json").json
    assert real["outcome"] == "compiled"
    assert eager("warm", llama_dir, "--json").json["outcome"] == "hit"


SHAPING = [
    ("--dtype", "bfloat16"),
    ("--dynamic-shapes", "backed"),
    ("--dynamic-shapes", "backed-size-oblivious"),
    ("--layer-names", "baked"),
    ("--experts", "grouped_mm"),
    ("--split-kv-update",),
    ("-O", "epilogue_fusion=false"),
    ("-O", "functorch.donated_buffer=false"),
]


@pytest.mark.parametrize("words", SHAPING, ids=" ".join)
def test_each_option_that_shapes_the_compilation_makes_a_program_of_its_own(
    warmed: Any, eager: Run, words: tuple[str, str]
) -> None:
    row = eager("warm", *words, "--json").json
    assert row["key"] != warmed.said["key"]
    assert row["program"] == "miss"
    assert len(row["miss"]["changes"]) == 1, "one option is one change"
    assert eager("warm", *words, "--json").json["program"] == "hit"
    assert eager("run", *words, "--max-new-tokens", "2", "--fail-on-miss").code == 0


def test_the_config_file_does_what_flags_do(eager: Run, workplace: Path, cache: Path) -> None:
    flags = ("--compile-range", "1:16", "--compile-size", "2", "--layers", "1")
    options = ("-O", "epilogue_fusion=false", "-O", "functorch.donated_buffer=false")
    flagged = eager("warm", *flags, *options, "--json").json
    (workplace / "vllmc.toml").write_text(
        'compile-range = ["1:16"]\ncompile-size = [2]\nlayers = 1\nbackend = "eager"\n'
        'weights = "real"\nsummary = "summary.md"\n'
        "[inductor]\nepilogue_fusion = false\n[functorch]\ndonated_buffer = false\n"
    )
    filed = eager("warm", "--json").json
    assert (filed["outcome"], filed["key"]) == ("hit", flagged["key"])
    assert "tiny-llama" in (workplace / "summary.md").read_text()


def test_a_bad_kind_of_weights_says_where_it_was_set(eager: Run, workplace: Path) -> None:
    (workplace / "vllmc.toml").write_text('weights = "none"\n')
    done = eager("warm")
    assert (done.code, done.error) == (2, "bad-value")
    assert "file:vllmc.toml:1" in done.err


def test_the_summary_is_appended_to_the_file_that_github_names(
    warmed: Any, eager: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = workplace / "step.md"
    page.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    assert eager("warm").code == 0
    assert eager("warm", "--check", "-O", "max_autotune=true").code == 3
    text = page.read_text()
    assert text.startswith("before\n### vllmc warm\n")
    assert "| tiny-llama | **hit** |" in text
    assert "| tiny-llama | **would-miss** |" in text
    assert "| inductor.max_autotune | false | true | flag |" in text
    chosen = workplace / "chosen.md"
    assert eager("warm", "--summary", chosen).code == 0
    assert chosen.read_text().startswith("### vllmc warm\n")
    assert page.read_text() == text


def test_a_summary_that_cannot_be_written_is_one_error(
    warmed: Any, eager: Run, workplace: Path
) -> None:
    (workplace / "file").write_text("")
    done = eager("warm", "--summary", workplace / "file" / "summary.md", "--json")
    assert done.code == 1
    assert done.json["error"]["code"] == "not-writable"


def test_a_person_is_told_what_was_compiled_and_then_that_nothing_was(eager: Run) -> None:
    first = eager("warm", "--layers", "3")
    lines = [line.rstrip() for line in first.out.splitlines()]
    assert lines[0] == "compiled  none of its units was stored, so all were compiled"
    assert "pieces  7: 3 splitting, 4 compilable, 3 unique" in lines
    assert "units   3 compiled" in lines
    assert re.search(r"^piece_2, piece_4  1:8192  compiled ", first.out, re.MULTILINE)
    assert first.err.splitlines()[0] == "capture"
    assert re.search(
        r"^\[3/3\] piece_6 for 1:8192 tokens: compiled, \d+ ms$", first.err, re.MULTILINE
    )
    second = eager("warm", "--layers", "3")
    assert second.out.startswith("hit  nothing had to be compiled\n")
    assert "3 from the cache" in second.out
    assert second.err == ""
    assert eager("warm", "--force", "-q").err == ""
    assert "differs from" in eager("warm", "--layers", "3", "--compile-size", "2").out


def test_a_changed_source_file_is_a_miss_that_names_the_file(
    workplace: Path, factory: Path, eager: Run, forget: Callable[[Path], None]
) -> None:
    helper = workplace / "helper.py"
    helper.write_text("def twice(x):\n    return x + x\n")
    (workplace / "doubled.py").write_text(
        "from factory import config\n"
        "from helper import twice\n"
        "from transformers import LlamaForCausalLM\n"
        "from transformers.models.llama.modeling_llama import LlamaMLP\n"
        "class Doubled(LlamaMLP):\n"
        "    def forward(self, x):\n"
        "        return twice(super().forward(x))\n"
        "def make():\n"
        "    model = LlamaForCausalLM(config())\n"
        "    for layer in model.model.layers:\n"
        "        layer.mlp = Doubled(model.config)\n"
        "    return model\n"
    )
    first = eager("warm", "doubled:make", "--json").json
    assert eager("warm", "doubled:make", "--json").json["outcome"] == "hit"
    forget(workplace)
    helper.write_text("def twice(x):\n    return (x + x) * 1.5\n")
    row = eager("warm", "doubled:make", "--check", "--json").json
    assert row["key"] == first["key"], "the key is known before capture traces the file"
    assert row["miss"]["nearest_key"] == first["key"]
    [change] = row["miss"]["changes"]
    assert "helper.py" in change["note"]
    assert "twice" in change["note"]
    again = eager("warm", "doubled:make", "--json").json
    assert (again["program"], again["outcome"]) == ("miss", "partial")
    # Both versions are kept: going back is a hit.
    forget(workplace)
    helper.write_text("def twice(x):\n    return x + x\n")
    assert eager("warm", "doubled:make", "--json").json["outcome"] == "hit"


def test_a_changed_value_that_no_file_holds_is_no_hit(
    workplace: Path, factory: Path, eager: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A global read from the environment, say: neither the key nor the sources' digests move."""
    (workplace / "scaled.py").write_text(
        "from factory import config\n"
        "from transformers import LlamaForCausalLM\n"
        "from transformers.models.llama.modeling_llama import LlamaMLP\n"
        "SCALE = 2.0\n"
        "class Scaled(LlamaMLP):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * SCALE\n"
        "def make():\n"
        "    model = LlamaForCausalLM(config())\n"
        "    for layer in model.model.layers:\n"
        "        layer.mlp = Scaled(model.config)\n"
        "    return model\n"
    )
    first = eager("warm", "scaled:make", "--json").json
    assert eager("warm", "scaled:make", "--check", "--json").json["outcome"] == "would-hit"
    monkeypatch.setattr(sys.modules["scaled"], "SCALE", 3.0)
    row = eager("warm", "scaled:make", "--check", "--json").json
    assert (row["key"], row["outcome"]) == (first["key"], "unknown")
    [change] = row["miss"]["changes"]
    assert (change["name"], change["before"], change["after"]) == ("scaled.SCALE", 2.0, 3.0)
    again = eager("warm", "scaled:make", "--json").json
    assert (again["program"], again["outcome"]) == ("miss", "partial")
    monkeypatch.setattr(sys.modules["scaled"], "SCALE", 2.0)
    assert eager("warm", "scaled:make", "--json").json["outcome"] == "hit"


def test_a_miss_next_to_another_model_does_not_import_that_model(
    workplace: Path, factory: Path, eager: Run, forget: Callable[[Path], None]
) -> None:
    code = (
        "from factory import config\n"
        "from transformers import LlamaForCausalLM\n"
        "FACTOR = 2.0\n"
        "class Scaled(LlamaForCausalLM):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        output = super().forward(*args, **kwargs)\n"
        "        output.logits = output.logits * FACTOR\n"
        "        return output\n"
        "def make():\n"
        "    return Scaled(config())\n"
    )
    for name in ("one", "other"):
        (workplace / f"{name}.py").write_text(code)
    assert eager("warm", "one:make", "--json").json["outcome"] == "compiled"
    forget(workplace)
    (workplace / "one.py").write_text("raise RuntimeError('its ops are registered already')\n")
    row = eager("warm", "other:make", "--json").json
    assert row["miss"]["nearest_model"] == "one:make"


def test_several_models_share_what_is_stored(eager: Run, factory: Any) -> None:
    done = eager("warm", "factory:small", "factory:other_vocabulary", "--json")
    first, second = done.json["results"]
    assert (done.code, first["outcome"]) == (0, "compiled")
    assert second["counts"]["hit"] > 0


def test_one_of_several_models_that_fails_does_not_stop_the_others(
    eager: Run, workplace: Path, tmp_path: Path
) -> None:
    (workplace / "broken.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(4, 4)\n"
        "    def forward(self, input_ids, position_ids):\n"
        "        raise RuntimeError('never')\n"
    )
    words = ("warm", "tiny-llama", "broken:Model", "tiny-llama")
    done = eager(*words, "--json", "--summary", tmp_path / "summary.md")
    first, failed, last = done.json["results"]
    assert (first["outcome"], last["outcome"]) == ("compiled", "hit")
    assert failed["outcome"] == "failed"
    assert failed["units"] == []
    assert failed["error"]["code"] == done.error
    assert failed["reason"] == failed["error"]["message"]
    assert done.code == 1
    assert "**failed**" in (tmp_path / "summary.md").read_text()
    shown = eager(*words)
    assert f"failed  {failed['reason']}" in shown.out
    # Alone it is an error as any other.
    alone = eager("warm", "broken:Model", "--json")
    assert (alone.code, alone.json["error"]["code"]) == (1, done.error)


def test_a_model_takes_few_files(warmed: Any) -> None:
    units = len(warmed.said["units"])
    # Record, artifact and note of code of each unit; the program's record, its uses and its lock.
    assert len(stored(warmed.root)) <= 3 * units + 3
    # What is known of this machine, and of the model.
    assert len([path for path in warmed.root.rglob("*") if path.is_file()]) <= 3 * units + 6


def test_a_dump_of_several_models_stays_below_its_directory(
    eager: Run, workplace: Path, llama_dir: Path
) -> None:
    for name in ("tiny", "other/tiny"):
        (workplace / name).mkdir(parents=True)
        shutil.copy(llama_dir / "config.json", workplace / name)
    models = (f"../{workplace.name}/tiny", workplace / "tiny", workplace / "other" / "tiny")
    done = eager("warm", *models, "--dump", "dump")
    assert done.code == 0, done.err
    found = {path.name for path in (workplace / "dump").iterdir()}
    assert found == {f"{workplace.name}-tiny", "tiny", "tiny-2"}
    assert [path.name for path in (workplace / "tiny").iterdir()] == ["config.json"]


def test_a_dump_leaves_no_text_of_the_one_before(eager: Run, workplace: Path) -> None:
    place = workplace / "dump" / "piece_0" / "1-8192"
    place.mkdir(parents=True)
    for name in ("before.py", "code.py", "mine.py"):
        (place / name).write_text("old")
    assert eager("warm", "--dump", "dump").code == 0
    assert {path.name for path in place.iterdir()} == {"code.py", "mine.py"}
    assert (place / "code.py").read_text() != "old"


def test_a_dump_that_cannot_be_written_is_found_out_before_compiling(
    eager: Run, workplace: Path, cache: Path
) -> None:
    (workplace / "taken").touch()
    for place in ("taken", "taken/below"):
        done = eager("warm", "--dump", place)
        assert (done.code, done.error) == (1, "not-writable")
    assert not (cache / "v1" / "units").exists()
