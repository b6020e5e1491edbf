from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllmc.cli.render import quantity
from vllmc.core.models.presets import PRESETS

Run = Callable[..., Any]


def test_the_table_and_the_json_show_the_same_presets(vllmc: Run) -> None:
    plain, machine = vllmc("models"), vllmc("models", "--json")
    assert plain.code == machine.code == 0
    assert plain.err == machine.err == ""
    assert machine.json["command"] == "models"
    rows = machine.json["models"]
    assert [row["name"] for row in rows] == [preset.name for preset in PRESETS]
    heading, *lines = plain.out.splitlines()
    assert heading.split() == ["NAME", "ARCHITECTURE", "LAYERS", "HIDDEN", "SIZE", "PARAMETERS"]
    assert [line.split() for line in lines] == [
        [
            row["name"],
            row["architecture"],
            str(row["layers"]),
            str(row["hidden_size"]),
            quantity(row["parameters"]),
        ]
        for row in rows
    ]


def test_the_presets_of_the_contract_are_there(vllmc: Run) -> None:
    rows = {row["name"]: row for row in vllmc("models", "--json").json["models"]}
    assert set(rows) >= {
        "tiny-llama",
        "qwen3-0.6b",
        "llama-3.2-1b",
        "llama-3.1-8b",
        "llama-3-70b",
        "mixtral-8x7b",
    }
    assert rows["llama-3-70b"] == {
        "name": "llama-3-70b",
        "architecture": "LlamaForCausalLM",
        "layers": 80,
        "hidden_size": 8192,
        "parameters": 70_553_706_496,
    }


def on_terminal(workplace: Path, columns: int, **environment: str) -> str:
    """What `vllmc models` writes to a terminal of this many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    program = "import sys; from vllmc.cli.app import main; sys.exit(main(['models']))"
    inherited = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=workplace,
        env={**inherited, "TERM": "xterm-256color", **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    chunks = []
    try:
        while chunk := os.read(ours, 4096):
            chunks.append(chunk)
    except OSError:  # Linux reports the end of a terminal as EIO.
        pass
    finally:
        os.close(ours)
    assert child.wait() == 0
    return b"".join(chunks).decode().replace("\r\n", "\n")


@pytest.mark.skipif(sys.platform != "linux", reason="terminals differ")
def test_a_terminal_gets_styles_and_a_narrow_one_gets_blocks(workplace: Path) -> None:
    wide = on_terminal(workplace, 100)
    assert "\x1b[1mNAME" in wide
    assert len(wide.splitlines()) == len(PRESETS) + 1
    narrow = on_terminal(workplace, 30, NO_COLOR="1")
    plain = narrow.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert "\x1b" not in plain
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= 30
    for preset in PRESETS:
        assert preset.name in plain
        assert preset.architecture in plain.replace("\n" + " " * 14, "")
