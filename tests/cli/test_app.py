from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from vllmc.cli.app import build_app, run
from vllmc.cli.options import CommonFlags, command
from vllmc.core.errors import CheckFailed, UnsafeCacheError, UsageError, VllmcError

Run = Callable[..., Any]
TRACES = Path(__file__).parents[1] / "core" / "diagnose" / "traces"
FAILURE = VllmcError(
    "unknown-model",
    "there is no model 'x'",
    context={"tried": ["preset", "hub id"], "count": 2},
    hint="vllmc models lists the presets",
)


def failing_app(error: BaseException) -> TyperGroup:
    @command
    def fail(common: CommonFlags) -> None:
        raise error

    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("fail")(fail)
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def test_an_error_is_named_on_stderr_with_its_context_and_hint(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing_app(FAILURE), ["fail"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "error[unknown-model]: there is no model 'x'",
        "  tried: preset, hub id",
        "  count: 2",
        "  hint: vllmc models lists the presets",
    ]


def test_an_error_under_json_is_also_one_object_on_stdout(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing_app(FAILURE), ["fail", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "schema_version": 1,
        "command": "fail",
        "error": {
            "code": "unknown-model",
            "message": "there is no model 'x'",
            "context": {"tried": ["preset", "hub id"], "count": 2},
            "hint": "vllmc models lists the presets",
        },
    }
    assert captured.err.startswith("error[unknown-model]: ")


@pytest.mark.parametrize(
    ("kind", "code"), [(VllmcError, 1), (UsageError, 2), (CheckFailed, 3), (UnsafeCacheError, 4)]
)
def test_each_class_of_error_has_its_exit_code(
    workplace: Path, kind: type[VllmcError], code: int
) -> None:
    assert run(failing_app(kind("some-code", "what happened")), ["fail"]) == code


def test_an_unforeseen_exception_is_an_internal_error_without_traceback(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing_app(LookupError("lost")), ["fail"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error[internal]: LookupError: lost\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("flags", [["-vv"], ["-v", "-v"]])
def test_a_traceback_is_shown_when_asked_for(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    for error in (LookupError("lost"), VllmcError("bad", "lost")):
        run(failing_app(error), ["fail", *flags])
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert "test_app.py" in err


def test_one_v_shows_no_traceback(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(failing_app(LookupError("lost")), ["fail", "-v"])
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupt_says_so_and_exits_130(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing_app(KeyboardInterrupt()), ["fail", "--json"]) == 130
    captured = capsys.readouterr()
    assert captured.err.startswith("error[interrupted]: ")
    assert json.loads(captured.out)["error"]["code"] == "interrupted"


def test_an_operating_system_error_is_not_called_a_fault_of_vllmc(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing_app(PermissionError(13, "Permission denied", "/x")), ["fail"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error[os-error]: ")
    assert "/x" in err


def test_a_pipe_that_breaks_inside_the_computation_is_not_hidden(
    workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(failing_app(BrokenPipeError(32, "a worker died")), ["fail"]) == 1
    assert "a worker died" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "command_name", "mentions"),
    [
        (["models", "--json", "--nope"], "models", "--nope"),
        (["models", "--json", "surplus"], "models", "surplus"),
        (["cache", "show", "--json"], "cache show", "KEY"),
        (["cache", "verify", "--json", "--config"], "cache verify", "--config"),
        (["cache", "lss", "--json"], "cache", "'ls'"),
        (["modls", "--json"], "vllmc", "'models'"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_wrong(
    vllmc: Run, words: list[str], command_name: str, mentions: str
) -> None:
    plain = vllmc(*[word for word in words if word != "--json"])
    assert plain.code == 2
    assert plain.out == ""
    assert plain.err.startswith("error[usage]: ")
    assert mentions in plain.err
    done = vllmc(*words)
    assert done.code == 2
    assert done.json["command"] == command_name
    assert done.json["error"]["code"] == "usage"
    assert done.json["error"]["hint"].endswith("--help")


def test_json_behind_a_double_dash_is_no_flag(vllmc: Run) -> None:
    done = vllmc("cache", "show", "--", "--json")
    assert done.code == 2
    assert done.out == ""
    assert "bad-key" in done.err


def test_help_names_every_command(vllmc: Run) -> None:
    done = vllmc("--help")
    assert done.code == 0
    for name in ("models", "cache"):
        assert name in done.out
    inner = vllmc("cache", "--help")
    for name in ("ls", "show", "stats", "verify", "path"):
        assert name in inner.out


@pytest.mark.parametrize("words", [(), ("cache",)])
def test_without_a_command_the_help_goes_to_stderr(vllmc: Run, words: tuple[str, ...]) -> None:
    done = vllmc(*words)
    assert (done.code, done.out) == (2, "")
    assert "Usage: vllmc" in done.err


def test_the_version_is_the_package_s(vllmc: Run) -> None:
    done = vllmc("--version")
    assert (done.code, done.out) == (0, f"vllmc {version('vllmc')}\n")


def leaves(group: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, child in group.commands.items():
        deeper = (*path, name)
        found += leaves(child, deeper) if hasattr(child, "commands") else [deeper]
    return found


def test_every_command_takes_the_common_options(vllmc: Run) -> None:
    commands = leaves(build_app())
    assert ("cache", "ls") in commands
    for words in commands:
        text = vllmc(*words, "--help").out
        for flag in ("--json", "-v ", "-q ", "--cache-dir", "--config"):
            assert flag in text, f"{words} lacks {flag}"


def test_the_console_script_exits_with_the_code_of_main(workplace: Path) -> None:
    # In a process of its own: it changes when Python looks for garbage.
    program = "from vllmc.cli.app import entry_point; entry_point()"
    command = [sys.executable, "-c", program, "cache", "show", "0123"]
    assert subprocess.run(command, cwd=workplace, capture_output=True, check=False).returncode == 2


def spawn(
    *words: str, cwd: Path, stdout: Any = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys\n"
        "from vllmc.cli.app import main\n"
        "code = main()\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy', 'sympy', 'pydantic', 'filelock'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLMC_")}
    environment["VLLMC_CACHE_DIR"] = str(cwd / "cache")
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        ("models",),
        ("cache", "ls"),
        ("cache", "verify", "--json"),
        ("inspect-key", f"{TRACES}/cold"),
        ("diff-config", f"{TRACES}/cold", f"{TRACES}/option", "--json"),
        ("recompiles", f"{TRACES}/cold"),
    ],
    ids=lambda words: " ".join(words).replace(f"{TRACES}/", ""),
)
def test_light_commands_import_nothing_heavy(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = spawn(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(
    ("words", "imported"),
    [
        ("--version", set()),
        ("cache ls", {"cache"}),
        ("models", {"models"}),
        (f"inspect-key {TRACES}/cold", {"inspect_key"}),
        (f"diff-config {TRACES}/cold {TRACES}/option", {"diff_config"}),
        ("warm --help", {"warm"}),
        (f"recompiles {TRACES}/cold", {"recompiles"}),
        ("--help", {"diff_config", "inspect_key", "models", "recompiles", "run", "warm"}),
    ],
    ids=lambda value: value.replace(f"{TRACES}/", "") if isinstance(value, str) else "",
)
def test_only_the_command_asked_for_is_imported(
    workplace: Path, words: str, imported: set[str]
) -> None:
    program = (
        "import json, sys\n"
        "from vllmc.cli.app import main\n"
        "assert main() == 0\n"
        "print(json.dumps([m for m in sys.modules if m.startswith('vllmc.cli.')]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words.split()], capture_output=True, text=True, check=True
    )
    found = {name.removeprefix("vllmc.cli.") for name in json.loads(done.stdout.splitlines()[-1])}
    commands = {"cache", "diff_config", "inspect_key", "models", "recompiles", "run", "warm"}
    assert found & commands == imported


@pytest.mark.parametrize("words", [("models",), ("models", "--json"), ("--help",)], ids=" ".join)
def test_a_closed_pipe_ends_quietly(tmp_path: Path, words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = spawn(*words, cwd=tmp_path, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_an_error(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = spawn("models", cwd=tmp_path, stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("error[os-error]: ")
    assert "Exception ignored" not in done.stderr
