from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmc.core.diagnose.vllm_log import VllmLog, is_vllm_log, read_log
from vllmc.core.errors import VllmcError

PREFIX = re.compile(r"^\(.*?\d\] ", re.MULTILINE)


def read(tmp_path: Path, text: str | bytes) -> VllmLog:
    path = tmp_path / "vllm.log"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_log(path)


def test_a_dump_has_the_key_its_factors_and_the_traced_files(
    tmp_path: Path, vllm_start: Any
) -> None:
    log = read(tmp_path, "INFO 06-20 14:45:30 [api_server.py:1] hello\n" + vllm_start.log())
    [dump] = log.dumps
    assert (dump.key, dump.label) == (vllm_start.key, "rank_0_0/backbone")
    assert dump.line == 5
    assert dump.facts.complete
    assert len(dump.facts.environment) == len(vllm_start.env)
    assert dump.sources == vllm_start.traced
    assert log.notes == ()


def colours(text: str) -> str:
    return re.sub(
        r"^(\(.*?\)) (\w+)", "\x1b[0;36m\\1\x1b[0;0m \x1b[37m\\2\x1b[0m", text, flags=re.M
    )


def kubernetes(text: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(f"2026-06-20T14:45:37.{i:09}Z stdout F {line}" for i, line in enumerate(lines))


def docker(text: str) -> str:
    return "".join(
        json.dumps({"log": line, "stream": "stderr", "time": "x"}) + "\n"
        for line in text.splitlines(keepends=True)
    )


def json_logger(text: str) -> str:
    """One object for each record, with its message's lines inside."""
    head, raw = text.split("Compile env factors (raw):\n")
    dump = "Compile env factors (raw):\n" + PREFIX.sub("", raw)
    messages = [*PREFIX.sub("", head).splitlines(), dump]
    return "".join(json.dumps({"process": 42, "message": m}) + "\n" for m in messages)


@pytest.mark.parametrize(
    "collect",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: PREFIX.sub("", text),
        lambda text: PREFIX.sub("DEBUG 06-20 14:45:37 [backends.py:370] ", text),
        lambda text: re.sub("^", "vllm-1  | ", text, flags=re.MULTILINE),
        lambda text: re.sub("^", "(RayWorker pid=7, ip=10.0.0.1) ", text, flags=re.MULTILINE),
        lambda text: PREFIX.sub("2026-06-10 11:30:42 | backends | 1396 | INFO : ", text),
        colours,
        kubernetes,
        docker,
        json_logger,
    ],
    ids=["crlf", "bare", "old", "compose", "ray", "own", "colours", "k8s", "docker", "json"],
)
def test_what_stands_before_the_lines_does_not_matter(
    tmp_path: Path, vllm_start: Any, collect: Callable[[str], str]
) -> None:
    log = read(tmp_path, collect(vllm_start.log()))
    [dump] = log.dumps
    assert dump.facts.complete, log.notes
    assert dump.key == vllm_start.key


def test_the_lines_of_several_processes_may_alternate(tmp_path: Path, vllm_start: Any) -> None:
    logs = [
        vllm_start.change(env={"VLLM_DP_RANK": rank})
        .log(process=f"Worker_TP{rank} pid={rank}", label=f"rank_{rank}_0/backbone")
        .splitlines(keepends=True)
        for rank in (0, 1)
    ]
    log = read(tmp_path, "".join(line for pair in zip(*logs, strict=True) for line in pair))
    assert [dump.label for dump in log.dumps] == ["rank_0_0/backbone", "rank_1_0/backbone"]
    assert [dump.facts.environment["VLLM_DP_RANK"] for dump in log.dumps] == [0, 1]
    assert all(dump.facts.complete for dump in log.dumps)


def test_values_on_several_lines_are_one_value(tmp_path: Path, vllm_start: Any) -> None:
    plugins = [f"a_plugin_with_a_long_name_{index}" for index in range(9)]
    words = " ".join(plugins)
    start = vllm_start.change(env={"VLLM_PLUGINS": plugins, "VLLM_WORDS": words, "VLLM_Z": {}})
    [dump] = read(tmp_path, start.log()).dumps
    assert dump.facts.environment["VLLM_PLUGINS"] == plugins
    assert dump.facts.environment["VLLM_WORDS"] == words
    assert dump.facts.complete


def test_a_dump_that_is_cut_short_is_used_as_far_as_it_goes(
    tmp_path: Path, vllm_start: Any
) -> None:
    text = vllm_start.log()
    log = read(tmp_path, text[: text.index("'VLLM_NIXL_SIDE_CHANNEL_HOST'") + 36])
    [dump] = log.dumps
    assert "CUDA_HOME" in dump.facts.environment
    assert dump.facts.env_hash == vllm_start.hashes["env"]
    assert not dump.facts.complete
    assert log.notes == (
        "line 4: cut short or not understood: VLLM_NIXL_SIDE_CHANNEL_HOST",
        "line 4: the dump is incomplete: its factors do not make its hash",
    )


@pytest.mark.parametrize("rest", [" 'VLLM_XGRAMMAR_CACHE_MB': 5", " 'VLLM_XGRAMMAR_CACHE_MB': "])
def test_a_value_that_is_cut_short_is_no_value(tmp_path: Path, vllm_start: Any, rest: str) -> None:
    text = vllm_start.log()
    log = read(tmp_path, text[: text.index(" 'VLLM_XGRAMMAR")] + rest)
    assert "VLLM_XGRAMMAR_CACHE_MB" not in log.dumps[0].facts.environment
    assert "VLLM_XGRAMMAR_CACHE_MB" in log.notes[0]


def test_hashes_without_a_dump_are_used(tmp_path: Path, vllm_start: Any) -> None:
    text = vllm_start.log()
    log = read(tmp_path, text[: text.index("Compile env factors")])
    [dump] = log.dumps
    assert {f.group for f in dump.facts.factors} == {"vllm.config", "vllm.code", "vllm.compiler"}
    assert log.notes == ("line 4: the environment's factors are not in the log, only their hash",)


def test_a_log_that_names_a_directory_alone_has_a_key(tmp_path: Path) -> None:
    [dump] = read(
        tmp_path,
        "INFO 03-13 09:00:39 [backends.py:409] Using cache directory: "
        "/home/u/.cache/vllm/torch_compile_cache/18abfd6fb8/rank_0_0 for vLLM's torch.compile\n",
    ).dumps
    assert (dump.key, dump.label, dump.facts.factors) == ("18abfd6fb8", "rank_0_0", ())


def test_a_whole_model_that_was_loaded_is_named(tmp_path: Path) -> None:
    path = "/root/.cache/vllm/torch_compile_cache/torch_aot_compile/40e9/rank_0_0/model"
    log = read(tmp_path, f"INFO x [backbone] Directly load AOT compilation from path {path}\n")
    assert (log.dumps, log.loaded) == ((), (path,))


def test_a_secret_in_a_dump_is_not_kept(tmp_path: Path, vllm_start: Any) -> None:
    log = read(tmp_path, vllm_start.change(env={"VLLM_API_KEY": "hunter2"}).log())
    assert "hunter2" not in repr(log)
    assert log.dumps[0].facts.complete


def test_only_a_log_that_speaks_of_the_cache_is_one(tmp_path: Path, vllm_start: Any) -> None:
    path = tmp_path / "some.log"
    path.write_text("INFO 06-20 14:45:30 [api_server.py:1] hello\n")
    assert not is_vllm_log(path)
    path.write_text(vllm_start.log())
    assert is_vllm_log(path)
    assert not is_vllm_log(tmp_path / "missing")
    with pytest.raises(VllmcError) as caught:
        read_log(tmp_path / "missing")
    assert caught.value.code == "not-readable"


@given(data=st.data())
def test_no_damage_to_a_log_makes_reading_fail(
    tmp_path_factory: pytest.TempPathFactory, vllm_start_class: Any, data: st.DataObject
) -> None:
    contents = bytearray(
        vllm_start_class(env={"A": 1, "B": ["x"], "VLLM_API_KEY": "k"}).log(), "utf-8"
    )
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(contents) - 1))
        contents[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=20))
        contents += b"\n"
    log = read(tmp_path_factory.getbasetemp(), bytes(contents))
    for dump in log.dumps:
        json.dumps([factor.to_json() for factor in dump.facts.factors])
        assert isinstance(dump.key, str)


def test_a_cache_that_is_off_is_told(tmp_path: Path, vllm_start: Any) -> None:
    off = "INFO 06-20 14:45:37 [compilation/backends.py:1118] [backbone] "
    log = read(tmp_path, f"{off}vLLM's torch.compile cache is disabled.\n{vllm_start.log()}")
    assert log.notes == ("line 1: vLLM's cache is off, so nothing is stored or loaded",)
    assert len(log.dumps) == 1
