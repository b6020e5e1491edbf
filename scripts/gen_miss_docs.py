"""Runs the commands in docs/explain-a-miss.md and writes what they print below them.

`--check` only says whether the page is up to date. What differs from machine to machine (hashes,
sizes, times, versions of what is installed) is as it was found where nothing else changed. Every
block starts where the one before it ended, in a directory that `prepare` fills.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pages import publish

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "explain-a-miss.md"
COLUMNS = 80

BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
STYLE = re.compile(r"\x1b\[[0-9;]*m")
VARIES = (
    (re.compile(r"\b[0-9a-f]{8,64}\b"), "HASH"),
    (re.compile(r"\b\d+(?:\.\d+)? (?:[kMG]?B|m?s)\b"), "AMOUNT"),
    (re.compile(r"\b\d+(?= (?:factors are|are) the same)"), "COUNT"),
    (re.compile(r"\b2\.\d+\.\d+(?:\+\w+)?"), "VERSION"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d"), "MOMENT"),
    (re.compile(r"[ \t]+"), " "),
)
MODEL = """\
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class MLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def small():
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = MLP(config)
    return model
"""


def prepare(place: Path) -> None:
    """Fills a directory with what the page's commands look at."""
    (place / "mymodel.py").write_text(MODEL, encoding="utf-8")
    # As a published cache of a model of 16 layers, and two pods of one deployment.
    layouts: dict[str, Any] = runpy.run_path(str(ROOT / "tests" / "conftest.py"))
    start = layouts["VllmStart"]()
    artifacts = (b"a" * 90_000, *(b"%d" % (n // 14) * 150_000 for n in range(15)), b"z" * 40_000)
    large = start.change(artifacts=artifacts, graph=layouts["graph_text"](layers=16))
    large.store(place / "node/vllm")
    for pod, host in (("pod-a", "10.0.3.17"), ("pod-b", "10.0.9.4")):
        of_pod = start.change(env={"VLLM_NIXL_SIDE_CHANNEL_HOST": host})
        (place / f"{pod}.log").write_text(of_pod.log(), encoding="utf-8")
    root = {
        "VLLM_CONFIG_ROOT": "/root/.config/vllm",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "localhost",
        "VLLM_XLA_CACHE_PATH": "/root/.cache/vllm/xla_cache",
    }
    start.change(env=root).store(place / "image/vllm", written_in="/root/.cache/vllm")
    shutil.copytree(ROOT / "tests/core/diagnose/traces/frozen", place / "trace")


def page(text: str) -> str:
    """The page with what its commands print now; where that only varies, as it was."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory).resolve()
        prepare(place)
        said = _say(place)
        return BLOCK.sub(lambda block: _same_or(block[0], said(block[0])), text)


def _say(place: Path) -> Callable[[str], str]:
    tool = place / "bin/vllmc"
    tool.parent.mkdir()
    program = "from vllmc.cli.app import entry_point; entry_point()"
    tool.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{program}' \"$@\"\n", encoding="utf-8")
    tool.chmod(0o755)
    kept = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "TMPDIR", "CC", "CXX")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {
        "PATH": f"{tool.parent}:{os.environ['PATH']}",
        "HOME": str(place),
        "TERM": "xterm",
        "NO_COLOR": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLMC_CACHE_DIR": str(place / "cache"),
    }

    def say(block: str) -> str:
        commands = re.findall(r"^\$ (.*)$", block, re.MULTILINE)
        return "".join(
            f"$ {command}\n{_printed(command, place, environment)}" for command in commands
        )

    return say


def _printed(command: str, place: Path, environment: dict[str, str]) -> str:
    """What a command prints on a terminal: its data, or what it complains about."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    done = subprocess.Popen(
        ["/bin/sh", "-c", command], cwd=place, env=environment, stdout=slave,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(slave)
    data = b"".join(_until_closed(master))
    done.wait()
    os.close(master)
    text = STYLE.sub("", data.decode()).replace("\r\n", "\n").replace(str(place), "/home/me")
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _until_closed(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:
            return
        if not data:
            return
        yield data


def _same_or(before: str, after: str) -> str:
    return before if _normal(before) == _normal(after) else after


def _normal(text: str) -> str:
    for pattern, name in VARIES:
        text = pattern.sub(name, text)
    return text


if __name__ == "__main__":
    sys.exit(publish(PAGE, page(PAGE.read_text(encoding="utf-8")), "scripts/gen_miss_docs.py"))
