from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from vllmc.cli.option_table import OPTIONS, RawOption
from vllmc.cli.settings import Settings, load_settings
from vllmc.core.errors import VllmcError


def load(directory: Path, toml: str | None = None, **environment: str) -> Settings:
    if toml is not None:
        (directory / "vllmc.toml").write_text(toml, encoding="utf-8")
    return load_settings(environment=environment, directory=directory)


def refusal(directory: Path, toml: str) -> VllmcError:
    with pytest.raises(VllmcError) as caught:
        load(directory, toml)
    return caught.value


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(
    tmp_path: Path,
) -> None:
    assert load(tmp_path).find("dtype", default=["auto"]).origin == "default"
    filed = load(tmp_path, '# ours\n\ndtype = "float16"\n').find("dtype", default=["auto"])
    assert (filed.value, filed.origin) == ("float16", "file:vllmc.toml:3")
    settings = load(tmp_path, VLLMC_DTYPE="bfloat16")
    varied = settings.find("dtype", default=["auto"])
    assert (varied.value, varied.origin) == ("bfloat16", "env:VLLMC_DTYPE")
    flagged = settings.find("dtype", ["float32"], default=["auto"])
    assert (flagged.value, flagged.origin) == ("float32", "flag")


def test_repeatable_options_are_lists_in_the_file_and_comma_separated_in_the_environment(
    tmp_path: Path,
) -> None:
    toml = 'compile-range = ["1:4", "5:8"]\ncompile-size = [1, 2]\n'
    filed = load(tmp_path, toml)
    assert filed.find("compile-range", default=[]).values == ("1:4", "5:8")
    assert filed.find("compile-size", default=[]).values == ("1", "2")
    varied = load(tmp_path, VLLMC_COMPILE_RANGE="1:2, 3:4")
    assert varied.find("compile-range", default=[]).values == ("1:2", "3:4")


def test_an_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    assert load(tmp_path, VLLMC_DTYPE=" ").find("dtype", default=["auto"]).origin == "default"


def test_an_empty_list_in_the_file_is_not_the_default(tmp_path: Path) -> None:
    setting = load(tmp_path, "compile-range = []\n").find("compile-range", default=["1:8"])
    assert (setting.values, setting.origin) == ((), "file:vllmc.toml:1")


def test_the_cache_directory_follows_the_same_order(tmp_path: Path) -> None:
    bare = load(tmp_path)
    assert bare.cache_dir == platformdirs.user_cache_path("vllmc")
    assert bare.cache_dir_origin == "default"
    filed = load(tmp_path, 'cache-dir = "kept"\n')
    assert (filed.cache_dir, filed.cache_dir_origin) == (tmp_path / "kept", "file:vllmc.toml:1")
    varied = load(tmp_path, VLLMC_CACHE_DIR="/from/env")
    assert (varied.cache_dir, varied.cache_dir_origin) == (
        Path("/from/env"),
        "env:VLLMC_CACHE_DIR",
    )
    flagged = load_settings(
        cache_dir=[Path("given")], environment={"VLLMC_CACHE_DIR": "/x"}, directory=tmp_path
    )
    assert (flagged.cache_dir, flagged.cache_dir_origin) == (tmp_path / "given", "flag")


def test_the_config_file_is_the_flag_s_then_the_variable_s_then_the_directory_s(
    tmp_path: Path,
) -> None:
    def dtype_of(**how: object) -> str:
        settings = load_settings(directory=tmp_path, **how)  # type: ignore[arg-type]
        return settings.find("dtype", default=["none"]).value

    assert dtype_of(environment={}) == "none"
    (tmp_path / "pyproject.toml").write_text('[tool.vllmc]\ndtype = "project"\n')
    assert dtype_of(environment={}) == "project"
    (tmp_path / "vllmc.toml").write_text('dtype = "local"\n')
    assert dtype_of(environment={}) == "local"
    (tmp_path / "b.toml").write_text('dtype = "variable"\n')
    assert dtype_of(environment={"VLLMC_CONFIG": "b.toml"}) == "variable"
    (tmp_path / "c.toml").write_text('dtype = "flag"\n')
    assert dtype_of(environment={"VLLMC_CONFIG": "b.toml"}, config=Path("c.toml")) == "flag"


def test_a_project_file_s_lines_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\ndtype = "not ours"\n\n[tool.vllmc]\ndtype = "float16"\n'
        "[tool.vllmc.inductor]\nmax_autotune = true\n"
    )
    settings = load(tmp_path)
    assert settings.find("dtype", default=[]).origin == "file:pyproject.toml:6"
    assert [o.origin for o in settings.raw_options] == ["file:pyproject.toml:8"]


@pytest.mark.parametrize(
    "text",
    ["[project]\nname = 1\n", "[tool.other]\nx = 1\n", "tool = {}\n", "this is no TOML", ""],
)
def test_a_project_file_that_does_not_mention_vllmc_is_no_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    assert load(tmp_path).config is None


def test_every_key_is_found_on_its_own_line(tmp_path: Path) -> None:
    toml = (
        "# dtype = 'commented out'\n"
        "compile-range = [\n"
        '    "1:4",  # dtype = "inside a list"\n'
        '    "5:8",\n'
        "]\n"
        'dtype = "auto"\n'
        '"layer-names" = """\\\n'
        "dtype = hoisted\\\n"
        '"""\n'
        "functorch = { donated_buffer = false, cse = true }\n"
        "inductor.triton.cudagraphs = true\n"
        "\n"
        "  [inductor] # [not] = a key\n"
        "max_autotune = true\n"
        "[inductor.cpp]\n"
        "threads = 1\n"
    )
    settings = load(tmp_path, toml.replace("inductor.triton", "#"))
    origins = {name: settings.find(name, default=[]).origin for name in ("dtype", "compile-range")}
    assert origins == {"dtype": "file:vllmc.toml:6", "compile-range": "file:vllmc.toml:2"}
    assert settings.find("layer-names", default=[]).origin == "file:vllmc.toml:7"
    assert {f"{o.scope}.{o.name}": o.origin for o in settings.raw_options} == {
        "functorch.donated_buffer": "file:vllmc.toml:10",
        "functorch.cse": "file:vllmc.toml:10",
        "inductor.max_autotune": "file:vllmc.toml:14",
        "inductor.cpp.threads": "file:vllmc.toml:16",
    }


def test_lines_are_counted_alike_with_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "vllmc.toml").write_bytes(b'# first\r\nlayers = 4\r\ndtype = "auto"\r\n')
    settings = load(tmp_path)
    assert settings.find("layers", default=[]).origin == "file:vllmc.toml:2"
    assert settings.find("dtype", default=[]).origin == "file:vllmc.toml:3"


def test_option_tables_become_texts_as_the_command_line_has_them(tmp_path: Path) -> None:
    toml = (
        "[inductor]\n"
        "max_autotune = true\n"
        "unroll = 3\n"
        'mode = "max"\n'
        "list = [1, 2]\n"
        "empty = {}\n"
        "triton.cudagraphs = false\n"
    )
    options = load(tmp_path, toml).raw_options
    assert [(o.name, o.text) for o in options] == [
        ("max_autotune", "true"),
        ("unroll", "3"),
        ("mode", "max"),
        ("list", "[1, 2]"),
        ("triton.cudagraphs", "false"),
    ]
    assert options[0] == RawOption(
        scope="inductor", name="max_autotune", text="true", origin="file:vllmc.toml:2"
    )


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    error = refusal(tmp_path, 'dtype = "auto"\ncompile-ranges = ["1:4"]\n')
    assert error.code == "unknown-setting"
    assert "vllmc.toml:2" in error.message
    assert "'compile-range'" in error.hint


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        ("dtype = 3", 1),
        ("\nlayers = true", 2),
        ('layers = "4"', 1),
        ("layers = 1.5", 1),
        ('compile-range = "1:512"', 1),
        ("compile-range = [1]", 1),
        ("\n\ncompile-size = [1, true]", 3),
        ("inductor = 3", 1),
        ("[[inductor]]\nmax_autotune = true", 1),
        ("[inductor]\nsince = 2026-01-01", 2),
        ("[functorch]\nx = inf", 2),
    ],
)
def test_a_wrong_type_is_refused_with_its_line(tmp_path: Path, toml: str, line: int) -> None:
    error = refusal(tmp_path, toml)
    assert error.code == "bad-setting"
    assert error.message.startswith(f"vllmc.toml:{line}: ")
    assert error.context["origin"] == f"file:vllmc.toml:{line}"


def test_a_vllmc_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool]\nvllmc = "x"\n')
    with pytest.raises(VllmcError, match=r"pyproject.toml:2: 'tool.vllmc' should be a table"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("toml", "line"), [('dtype = "auto"\nlayers = = 3\n', 2), ('a = 1\n\nb = ["x"', 3)]
)
def test_malformed_toml_is_refused_with_its_line(tmp_path: Path, toml: str, line: int) -> None:
    error = refusal(tmp_path, toml)
    assert error.code == "bad-config-file"
    assert error.context["line"] == line
    assert "vllmc.toml" in error.message


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vllmc.toml").write_bytes(b'dtype = "\xff"\n')
    with pytest.raises(VllmcError, match=r"cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("named_by", ["--config", "VLLMC_CONFIG"])
def test_a_config_file_that_was_named_must_exist(tmp_path: Path, named_by: str) -> None:
    flag = Path("gone.toml") if named_by == "--config" else None
    environment = {} if flag else {"VLLMC_CONFIG": "gone.toml"}
    with pytest.raises(VllmcError) as caught:
        load_settings(config=flag, environment=environment, directory=tmp_path)
    assert caught.value.code == "no-config-file"
    assert caught.value.context["named by"] == named_by


def test_a_directory_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(VllmcError, match="cannot be read"):
        load_settings(config=tmp_path, environment={}, directory=tmp_path)


def test_each_option_has_a_variable_of_its_name(tmp_path: Path) -> None:
    for option in OPTIONS:
        variable = "VLLMC_" + option.name.upper().replace("-", "_")
        setting = load(tmp_path, **{variable: "1"}).find(option.name, default=[])
        assert (setting.values, setting.origin) == (("1",), f"env:{variable}")


def test_the_step_summary_is_the_one_of_github(tmp_path: Path) -> None:
    assert load(tmp_path).step_summary is None
    assert load(tmp_path, GITHUB_STEP_SUMMARY="/run/summary").step_summary == Path("/run/summary")


def test_the_environment_is_the_process_s_unless_given(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLMC_DTYPE", "float16")
    settings = load_settings()
    monkeypatch.setenv("VLLMC_DTYPE", "bfloat16")
    assert settings.find("dtype", default=[]).value == "float16"


def test_a_home_that_nobody_has_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(VllmcError) as caught:
        load(tmp_path, VLLMC_CACHE_DIR="~nonesuch/cache")
    assert caught.value.code == "no-home-directory"
    assert "~nonesuch/cache" in caught.value.message
