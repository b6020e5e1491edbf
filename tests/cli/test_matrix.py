from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vllmc.cli.matrix import Entry, read_matrix
from vllmc.cli.option_table import OPTIONS, RawOption
from vllmc.cli.options import CompileFlags
from vllmc.core.errors import VllmcError

MATRIX = """
[[warm]]
model = "tiny-llama"
compile-range = ["1:512"]

[[warm]]
name = "tuned, two layers"
model = "tiny-llama"
layers = 2
split-kv-update = true
[warm.inductor]
max_autotune = true
triton.descriptive_names = "False"
[warm.functorch]
donated_buffer = false
"""


def read(directory: Path, text: str) -> tuple[Entry, ...]:
    path = directory / "warm.toml"
    path.write_text(text, encoding="utf-8")
    return read_matrix(path)


def refusal(directory: Path, text: str) -> VllmcError:
    with pytest.raises(VllmcError) as caught:
        read(directory, text)
    return caught.value


def test_each_table_is_an_entry_with_the_settings_that_a_config_file_would_give(
    tmp_path: Path,
) -> None:
    plain, tuned = read(tmp_path, MATRIX)
    assert (plain.name, plain.model, plain.line) == ("tiny-llama", "tiny-llama", 2)
    assert plain.config.settings["compile-range"].values == ("1:512",)
    assert plain.config.settings["compile-range"].origin == "file:warm.toml:4"
    assert (tuned.name, tuned.model, tuned.line) == ("tuned, two layers", "tiny-llama", 6)
    assert {name: s.value for name, s in tuned.config.settings.items()} == {
        "layers": "2",
        "split-kv-update": "true",
    }
    assert tuned.config.options == (
        RawOption(scope="inductor", name="max_autotune", text="true", origin="file:warm.toml:12"),
        RawOption(
            scope="inductor",
            name="triton.descriptive_names",
            text="False",
            origin="file:warm.toml:13",
        ),
        RawOption(
            scope="functorch", name="donated_buffer", text="false", origin="file:warm.toml:15"
        ),
    )


def test_an_entry_takes_exactly_the_options_that_shape_a_compilation() -> None:
    flags = {
        {"option": None, "add_pass": "pass"}.get(field.name, field.name.replace("_", "-"))
        for field in dataclasses.fields(CompileFlags)
    }
    assert {option.name for option in OPTIONS if option.shapes} == flags - {None}


def test_a_directory_is_looked_for_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, elsewhere = tmp_path / "ci", tmp_path / "work"
    (beside / "models" / "chat").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    text = '[[warm]]\nmodel = "models/chat"\n[[warm]]\nmodel = "org/name"\n'
    (beside / "warm.toml").write_text(text)
    chat, hub = read_matrix(Path("../ci/warm.toml"))
    assert (chat.name, chat.model) == ("models/chat", "../ci/models/chat")
    assert hub.model == "org/name"
    absolute = read(tmp_path, f'[[warm]]\nmodel = "{beside}"\n')
    assert absolute[0].model == str(beside)


UNKNOWN = [
    ('[[warm]]\nmodel = "m"\ndtipe = "float16"\n', 3, "did you mean 'dtype'?"),
    ('[[warm]]\nmodle = "m"\n', 2, "did you mean 'model'?"),
    ('[[warm]]\nmodel = "m"\n[warm.inducter]\na = 1\n', 3, "did you mean 'inductor'?"),
    ('[[warm]]\nmodel = "m"\ncache-dir = "c"\n', 3, ""),
    ('[[warm]]\nmodel = "m"\n[[warm.more]]\n', 3, ""),
    ('dtype = "float16"\n[[warm]]\nmodel = "m"\n', 1, ""),
]


@pytest.mark.parametrize(("text", "line", "hint"), UNKNOWN)
def test_an_unknown_key_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, hint: str
) -> None:
    error = refusal(tmp_path, text)
    assert error.code == "unknown-setting"
    assert error.message.startswith(f"warm.toml:{line} sets '")
    assert error.context["origin"] == f"file:warm.toml:{line}"
    assert error.hint
    assert hint in error.hint


BAD = [
    ('[[warm]]\nname = "n"\n', 1, "this entry names no model"),
    ("[[warm]]\nmodel = 7\n", 2, "'model' should be a text in one line, and is 7"),
    ('[[warm]]\nmodel = " "\n', 2, "'model' should be a text in one line"),
    ('[[warm]]\nmodel = "m"\nname = "a\\nb"\n', 3, "'name' should be a text in one line"),
    ('[[warm]]\nmodel = "m"\nlayers = "2"\n', 3, "'layers' should be a number, and is '2'"),
    ('[[warm]]\nmodel = "m"\ncompile-size = 8\n', 3, "'compile-size' should be a list"),
    ('[[warm]]\nmodel = "m"\ninductor = 1\n', 3, "'inductor' should be a table"),
    ('\nwarm = "m"\n', 2, "'warm' should be a list of tables"),
    ('\n\nwarm = [{model = "m", dtype = 1}]\n', 3, "'dtype' should be a text, and is 1"),
    ('[warm]\nmodel = "m"\n', 1, "'warm' should be a list of tables"),
    ('[[warm]]\nmodel = "m"\n[[warm]]\nmodel = "m"\n', 3, "'m' is what the entry in line 1"),
]


@pytest.mark.parametrize(("text", "line", "message"), BAD)
def test_what_cannot_be_meant_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    error = refusal(tmp_path, text)
    assert error.code == "bad-setting"
    assert error.message.startswith(f"warm.toml:{line}: {message}")
    assert error.context["origin"] == f"file:warm.toml:{line}"
    assert error.hint


@pytest.mark.parametrize("text", ["", "warm = []\n", "# nothing\n"])
def test_a_file_without_entries_is_refused(tmp_path: Path, text: str) -> None:
    error = refusal(tmp_path, text)
    assert (error.code, error.context) == (
        "bad-config-file",
        {"file": str(tmp_path / "warm.toml")},
    )
    assert "[[warm]]" in error.hint


def test_a_file_that_is_no_toml_or_not_there_is_refused(tmp_path: Path) -> None:
    broken = refusal(tmp_path, "[[warm]]\nmodel = tiny\n")
    assert (broken.code, broken.context["line"]) == ("bad-config-file", 2)
    assert broken.message.startswith(f"the matrix file {tmp_path / 'warm.toml'} is not TOML")
    with pytest.raises(VllmcError) as caught:
        read_matrix(tmp_path / "none.toml")
    assert caught.value.code == "no-config-file"
    assert caught.value.hint == "correct --from, or leave it out"
