from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from vllmc.cli import report

KEY, NEAREST = "0123456789ab" + "0" * 52, "fedcba987654" + "0" * 52


def lines(renderable: RenderableType) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=160, force_terminal=False).print(renderable)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def unit(outcome: str, *pieces: str) -> dict[str, Any]:
    return {
        "pieces": list(pieces),
        "range": "1:8192",
        "outcome": outcome,
        "artifact": "aa" * 32,
        "bytes": 1500,
        "seconds": 0.0 if outcome == "hit" else 1.5,
    }


def change(name: str = "max_autotune", **fields: Any) -> dict[str, Any]:
    return {
        "group": "inductor",
        "name": name,
        "before": False,
        "after": True,
        "kind": "changed",
        "class": "codegen",
        "affects_key": True,
        "origin_before": "default",
        "origin_after": "flag",
        "note": "",
        "restore": f"leave out -O {name}",
    } | fields


def warmed(outcome: str, *units: dict[str, Any], **fields: Any) -> dict[str, Any]:
    kinds = [u["outcome"] for u in units]
    return {
        "name": "tiny-llama",
        "model": "tiny-llama",
        "key": KEY,
        "outcome": outcome,
        "program": "hit" if outcome == "hit" else "miss",
        "pieces": {"total": 5, "splitting": 2, "compilable": 3, "unique": 3},
        "counts": {name: kinds.count(name) for name in ("hit", "dup", "compiled")},
        "units": list(units),
        "seconds": {"total": 4.0, "capture": 1.0, "compile": 2.5, "store": 0.1},
        "saved_seconds": 0.0,
        "peak_rss_mb": 512,
        "miss": None
        if outcome == "hit"
        else {"nearest_key": None, "nearest_model": None, "changes": []},
        "layer_names": None,
        "passes": [],
    } | fields


def test_a_compilation_shows_its_units_and_where_the_time_went() -> None:
    row = warmed("compiled", unit("compiled", "piece_0"), unit("compiled", "piece_2", "piece_4"))
    assert lines(report.warm([row])) == [
        "compiled  none of its units was stored, so all were compiled",
        "model   tiny-llama",
        "key     0123456789ab",
        "pieces  5: 2 splitting, 3 compilable, 3 unique",
        "units   2 compiled",
        "time    4.0 s (1.0 s capture, 2.5 s compile)",
        "memory  512 MB at most",
        "",
        "UNIT              RANGE   OUTCOME     SIZE   TIME  ARTIFACT",
        "piece_0           1:8192  compiled  1.5 kB  1.5 s  aaaaaaaaaaaa",
        "piece_2, piece_4  1:8192  compiled  1.5 kB  1.5 s  aaaaaaaaaaaa",
    ]


def test_a_hit_says_that_nothing_was_compiled_and_names_no_stage_it_skipped() -> None:
    seconds = {"total": 0.01, "capture": 0.0, "compile": 0.0, "store": 0.0}
    text = lines(report.warm([warmed("hit", unit("hit", "piece_0"), seconds=seconds)]))
    assert text[0] == "hit  nothing had to be compiled"
    assert "units   1 from the cache" in text
    assert "time    10 ms" in text


def test_each_kind_of_unit_is_counted_in_words_and_a_dup_is_explained() -> None:
    units = [unit("hit", "piece_0"), unit("dup", "piece_2"), unit("compiled", "piece_4")]
    text = lines(report.warm([warmed("partial", *units)]))
    assert (
        "units   1 from the cache, 1 compiled, 1 compiled to code that was stored already" in text
    )
    assert text[-1].startswith("dup: compiled now, and the code turned out to be stored already")
    assert "dup: " not in "\n".join(lines(report.warm([warmed("partial", *units[::2])])))


def named(compiled: int) -> dict[str, Any]:
    return {
        "unique": 33,
        "would_be": 3,
        "ops": [
            {
                "op": "myops::kv_update",
                "argument": "layer_name",
                "values": 31,
                "examples": ["model.layers.1", "model.layers.31"],
                "pieces": [f"piece_{2 * n}" for n in range(1, 32)],
                "fix": "first line\nsecond line",
            }
        ],
        "compiled": compiled,
        "seconds": 12.3 if compiled else 0.0,
        "bytes": 4_100_000,
    }


def test_what_layer_names_cost_is_told_with_the_op_and_the_cure() -> None:
    row = warmed("compiled", unit("compiled", "piece_0"), layer_names=named(30))
    assert lines(report.warm([row]))[-6:] == [
        "",
        "layer-name strings made 33 pieces unique that would otherwise be 3: "
        "30 more units compiled in 12.3 s, 4.1 MB stored",
        "op   myops::kv_update, argument layer_name: 31 strings, "
        "'model.layers.1' to 'model.layers.31'",
        "in   piece_2, piece_4, piece_6 and 28 more",
        "fix  first line",
        "     second line",
    ]


def test_layer_names_of_units_that_were_stored_cost_no_time() -> None:
    row = warmed("partial", unit("hit", "piece_0"), layer_names=named(0))
    assert "otherwise be 3: 4.1 MB stored" in "\n".join(lines(report.warm([row])))


def test_a_forced_compilation_does_not_claim_that_nothing_was_stored() -> None:
    text = lines(report.warm([warmed("compiled", unit("compiled", "piece_0"), miss=None)]))
    assert text[0] == "compiled  everything was compiled again, as --force asks"


def test_a_prediction_gives_its_reason_and_no_facts_that_it_lacks() -> None:
    row = warmed(
        "would-miss",
        pieces=None,
        seconds={"total": 0.0, "capture": 0.0, "compile": 0.0, "store": 0.0},
        reason="the cache holds no program yet",
    )
    assert lines(report.warm([row])) == [
        "would-miss  the cache holds no program yet",
        "model  tiny-llama",
        "key    0123456789ab",
    ]


def test_a_miss_names_the_changes_and_how_many_more_there_are() -> None:
    changes = [change(f"option_{n:02}") for n in range(14)]
    miss = {"nearest_key": NEAREST, "nearest_model": None, "changes": changes}
    text = lines(report.warm([warmed("compiled", unit("compiled", "piece_0"), miss=miss)]))
    start = text.index("what differs from fedcba987654, the nearest program in the cache:")
    assert text[start + 2].split() == [
        "inductor.option_00",
        "false",
        "->",
        "true",
        "flag",
        "codegen",
    ]
    end = text.index("and 2 more; --json lists them all")
    assert "option_11" in text[end - 1]
    assert text[end + 1 : end + 3] == ["", "to have it as it was:"]
    assert text[end + 3].split() == ["inductor.option_00", "leave", "out", "-O", "option_00"]
    assert "option_11" in text[-1]


def test_the_nearest_program_of_another_model_is_named_and_not_compared() -> None:
    changes = [change("option"), change("hidden_size", group="model", **{"class": "identity"})]
    miss = {"nearest_key": NEAREST, "nearest_model": "gpt2", "changes": changes}
    text = lines(report.warm([warmed("compiled", unit("compiled", "piece_0"), miss=miss)]))
    nearest = "the nearest program, fedcba987654, is one of gpt2"
    assert text[-1] == f"{nearest}, with 1 other difference"
    alike = {**miss, "changes": changes[1:]}
    text = lines(report.warm([warmed("compiled", unit("compiled", "piece_0"), miss=alike)]))
    assert text[-1] == f"{nearest}, compiled alike"


def test_a_record_without_its_artifacts_is_said_to_be_that() -> None:
    miss = {"nearest_key": KEY, "nearest_model": None, "changes": []}
    text = lines(report.warm([warmed("partial", unit("hit", "piece_0"), miss=miss)]))
    assert text[-1] == "the record of 0123456789ab is stored, but not all that it names"


def test_what_the_passes_did_is_told_to_who_asks() -> None:
    fused = {
        "name": "norm-quant",
        "matches": 4,
        "nodes_before": 212,
        "nodes_after": 177,
        "seconds": 0.25,
        "missed": None,
    }
    missed = {"graph": "piece_2", "node": "mul_3", "expected": "aten.exp", "found": "aten.sin"}
    gated = {**fused, "name": "activation-quant", "matches": 0, "missed": missed}
    partly = {**gated, "matches": 1}
    row = warmed("compiled", unit("compiled", "piece_0"), passes=[fused, gated, partly])
    assert "norm-quant" not in "\n".join(lines(report.warm([row])))
    assert lines(report.warm([row], verbose=True))[-6:] == [
        "PASS              MATCHES  NODES         TIME",
        "norm-quant              4  212 to 177  250 ms",
        "activation-quant        0  212 to 177  250 ms",
        "activation-quant        1  212 to 177  250 ms",
        "activation-quant matched nothing: in piece_2, at mul_3, it expected aten.exp and found "
        "aten.sin",
        "activation-quant does not match all: in piece_2, at mul_3, it expected aten.exp and found "
        "aten.sin",
    ]


def test_several_models_are_set_apart_by_an_empty_line() -> None:
    text = lines(report.warm([warmed("hit"), warmed("hit", name="other", model="other")]))
    second = text.index("model   other")
    assert text[second - 2 : second] == ["", "hit  nothing had to be compiled"]
    assert text[-2:] == ["", "2 in all: 2 hit"]


def test_an_entry_says_what_it_is_called_and_what_was_saved() -> None:
    named = warmed("hit", name="tuned", saved_seconds=61.0)
    text = lines(report.warm([named]))
    assert text[1:3] == ["entry   tuned", "model   tiny-llama"]
    assert "saved   1 min 1 s that what was found took once" in text


def test_a_model_that_was_not_found_has_no_key() -> None:
    failed = warmed("failed", key=None, reason="there is no such model", pieces=None)
    text = lines(report.warm([failed]))
    assert text[0] == "failed  there is no such model"
    assert not [line for line in text if line.startswith("key")]


def factor(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "group": "inductor",
        "name": name,
        "value": True,
        "digest": "00",
        "origin": "default",
        "is_default": True,
        "affects_key": True,
    } | fields


INSPECTED = {
    "model": "tiny-llama",
    "key": KEY,
    "prediction": {
        "outcome": "miss",
        "reason": "no program is stored",
        "nearest_key": NEAREST,
        "nearest_model": None,
        "changes": [change()],
    },
    "factors": [
        factor("epilogue_fusion"),
        factor("max_autotune", origin="flag", is_default=False),
        factor("cxx", group="system", origin="probe", affects_key=False),
    ],
    "excluded": [{"name": "system.threads", "reason": "asked for at run time"}],
}


def test_inspect_shows_what_somebody_set_and_what_is_recorded_only() -> None:
    text = "\n".join(lines(report.inspect(INSPECTED, whole=False)))
    assert "prediction  miss  no program is stored\nwhat differs from fedcba987654" in text
    assert "max_autotune" in text
    assert "cxx (not in the key)" in text
    assert "epilogue_fusion" not in text
    assert "system.threads" not in text
    assert text.endswith("1 more that nobody set; -v shows them")


def test_inspect_whole_shows_every_factor_and_what_is_none() -> None:
    text = "\n".join(lines(report.inspect(INSPECTED, whole=True)))
    assert "epilogue_fusion" in text
    assert "more that nobody set" not in text
    assert text.endswith("system.threads  asked for at run time")


def test_inspect_of_a_unit_names_no_model_and_predicts_nothing() -> None:
    row = {"model": "", "key": KEY, "factors": INSPECTED["factors"], "excluded": []}
    text = lines(report.inspect(row, whole=False))
    assert text[0] == f"key  {KEY}"
    assert "prediction" not in "\n".join(text)


def compared(*changes: dict[str, Any]) -> dict[str, Any]:
    return {
        "a": {"kind": "key", "name": "0123456789ab"},
        "b": {"kind": "current", "name": ""},
        "equal": not any(c["affects_key"] for c in changes),
        "changes": list(changes),
        "same": 700,
        "notes": [],
    }


def test_a_comparison_without_differences_says_so() -> None:
    assert lines(report.diff(compared())) == [
        "equal: no difference affects the key",
        "a  key 0123456789ab",
        "b  current",
        "",
        "700 factors are the same",
    ]


@pytest.mark.parametrize(
    ("count", "verdict"),
    [
        (1, "1 difference affects the key: inductor.option_0"),
        (2, "2 differences affect the key: inductor.option_0, inductor.option_1"),
    ],
)
def test_a_comparison_counts_the_differences_that_affect_the_key(count: int, verdict: str) -> None:
    changes = [change(f"option_{n}") for n in range(count)]
    recorded = change("cxx_compiler", group="system", affects_key=False)
    recorded["class"] = "surroundings"
    text = lines(report.diff(compared(*changes, recorded)))
    assert text[0] == verdict
    assert text[-2].split()[-1] == "key"
    assert "surroundings, not in the key" in text[-2]


def test_a_comparison_is_equal_when_nothing_that_differs_affects_the_key() -> None:
    text = lines(report.diff(compared(change(affects_key=False))))
    assert text[0] == "equal: no difference affects the key"
    assert "inductor.max_autotune" in text[5]


def test_remarks_on_a_comparison_stand_below_it() -> None:
    row = compared() | {"notes": ["the log is cut short", "rank_0_0 was taken"]}
    assert lines(report.diff(row))[-3:] == [
        "",
        "note  the log is cut short",
        "note  rank_0_0 was taken",
    ]


def ran(*recompiles: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "tiny-llama",
        "key": KEY,
        "outputs": [
            {"prompt": "1,2", "token_ids": [3, 4], "text": None, "finish_reason": "length"},
            {"prompt": "hi", "token_ids": [3, 4], "text": "[b]you[/b]", "finish_reason": "stop"},
        ],
        "counts": {"hit": 3, "dup": 0, "compiled": 0},
        "recompiles": list(recompiles),
        "seconds": {"load": 0.2, "first_token": 0.05, "total": 1.0},
        "tokens_per_second": {"prefill": 99.6, "decode": 12.2},
    }


def test_a_run_shows_each_prompt_with_its_text_or_its_tokens() -> None:
    assert lines(report.run(ran())) == [
        "> 1,2",
        "3, 4",
        "> hi",
        "[b]you[/b]",
        "",
        "units        3 from the cache",
        "load         200 ms",
        "first token  50 ms",
        "speed        prefill 100, decode 12 tokens/s",
        "recompiles   0",
    ]


def test_a_run_explains_each_recompile() -> None:
    recompile = {
        "frame": "model.py:3 in f",
        "class": "shape",
        "guard": "L['x'].size()[0] == 4",
        "subject": "L['x'].size()[0]",
        "expected": "4",
        "observed": "7",
        "count": 2,
        "limit_hit": False,
        "cost_seconds": 0.5,
        "pattern": "one per size",
        "dropped": False,
        "fix": "mark it",
    }
    bare = recompile | {
        "observed": "", "expected": "", "pattern": "", "cost_seconds": None, "limit_hit": True,
        "dropped": True,
    }  # fmt: skip
    text = lines(report.run(ran(recompile, bare)))
    assert "recompiles   4" in text
    start = text.index("frame     model.py:3 in f")
    assert text[start : start + 8] == [
        "frame     model.py:3 in f",
        "guard     L['x'].size()[0] == 4",
        "class     shape",
        "expected  4, found 7",
        "times     2",
        "pattern   one per size",
        "cost      500 ms",
        "fix       mark it",
    ]
    assert (
        "limit    the recompile limit was hit: eager since then (fullgraph=True: an error)" in text
    )
    assert text.count("dropped  nothing compiled again: steps that broke it may be wrong") == 1
    assert "\n".join(text).count("expected  ") == 1
