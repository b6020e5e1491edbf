"""Guards that a program runs without, held against what a workload does: `run --guards check`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

# What the model reads, what its op makes of that, and what is computed with it.
MODEL = """
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from factory import config


def first(x):
    return 2 * x


def second(x):
    return 3 * x


VALUE = {value}


@torch.library.custom_op("{namespace}::tick", mutates_args=())
def tick(x: torch.Tensor) -> torch.Tensor:
    global VALUE
    VALUE = {change}
    return x.clone()


@tick.register_fake
def _(x):
    return torch.empty_like(x)


class Ticking(LlamaMLP):
    def forward(self, x):
        x = torch.ops.{namespace}.tick(super().forward(x))
        return x * {use}


class Branching(LlamaMLP):
    def forward(self, x):
        if x.shape[1] % 8 == 0:
            x = -x
        return super().forward(x)


def with_mlp(cls):
    model = LlamaForCausalLM(config(num_hidden_layers=1))
    model.model.layers[0].mlp = cls(model.config)
    return model


def ticking():
    return with_mlp(Ticking)


def branching():
    return with_mlp(Branching)
"""

# The same counter as an attribute, and as the fix has it.
CURED = """
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from counted import with_mlp

MODULES = []


@torch.library.custom_op("e2e_cured::count", mutates_args=())
def count(x: torch.Tensor) -> torch.Tensor:
    MODULES[-1].step += 1
    return x.clone()


@count.register_fake
def _(x):
    return torch.empty_like(x)


class Counting(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.step = 0
        MODULES.append(self)

    def forward(self, x):
        return torch.ops.e2e_cured.count(super().forward(x)) * (1 + self.step)


class CuredCounting(Counting):
    def __init__(self, config):
        super().__init__(config)
        self.step = torch.tensor(self.step)


COUNT = 0


class Buffered(Counting):
    def __init__(self, config):
        super().__init__(config)
        del self.step
        self.register_buffer("step", torch.tensor(COUNT), persistent=False)


def counting():
    return with_mlp(Counting)


def cured():
    return with_mlp(CuredCounting)


def buffered():
    return with_mlp(Buffered)
"""

NINE_TO_63 = ("--dynamic-shapes", "backed", "--compile-range", "9:63", "--max-new-tokens", "1")
SIXTEEN = ",".join(map(str, range(16)))
SEVENTEEN = ",".join(map(str, range(17)))


@pytest.fixture
def write(factory: Path, workplace: Path, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Writes the module `counted`, whose op sets its global `VALUE` to `change` at each call."""
    namespace = f"e2e_guards_{abs(hash(request.node.nodeid))}"

    def module(value: str = "0", change: str = "VALUE + 1", use: str = "(1 + VALUE)") -> None:
        text = MODEL.format(value=value, change=change, use=use, namespace=namespace)
        (workplace / "counted.py").write_text(text)

    return module


@pytest.fixture
def counted(write: Callable[..., None]) -> None:
    """The module `counted`, with a counter."""
    write()


@pytest.mark.usefixtures("counted")
def test_a_size_that_breaks_what_capture_assumed_is_reported_and_fails_the_run(eager: Run) -> None:
    words = ("run", "counted:branching", *NINE_TO_63, "--prompt-ids", SIXTEEN, "--json")
    seen = eager(*words, "--guards", "check", "--batch-size", "1", "--batch-size", "2")
    assert seen.code == 0, seen.err
    [row] = seen.json["recompiles"]
    assert row["frame"].startswith("modeling_llama.py:")
    assert row["frame"].endswith(" in forward")
    # A batch of 16 tokens, and one of 32.
    assert row | {"frame": ""} == {
        "frame": "",
        "class": "shape",
        "guard": "input_ids.size()[1] % 8 != 0",
        "subject": "input_ids.size()[1]",
        "expected": "input_ids.size()[1] % 8 != 0",
        "observed": "16",
        "count": 2,
        "limit_hit": False,
        "cost_seconds": None,
        "pattern": "",
        "dropped": True,
        "fix": row["fix"],
    }
    failed = eager(*words, "--fail-on-recompile")
    assert failed.code == 3
    [again] = failed.json["recompiles"]
    assert (again["guard"], again["count"]) == (row["guard"], 1)


@pytest.mark.usefixtures("counted")
def test_a_person_sees_the_broken_guard_as_they_see_a_recompile(eager: Run) -> None:
    words = ("run", "counted:branching", *NINE_TO_63, "--prompt-ids", SIXTEEN)
    done = eager(*words, "--fail-on-recompile")
    assert done.code == 3
    lines = [line.rstrip() for line in done.out.splitlines()]
    assert "recompiles   1" in lines
    assert "guard     input_ids.size()[1] % 8 != 0" in lines
    assert "expected  input_ids.size()[1] % 8 != 0, found 16" in lines
    assert any(line.startswith("dropped   nothing compiled again") for line in lines)
    assert any(line.startswith("fix       --dynamic-shapes unbacked") for line in lines)


@pytest.mark.usefixtures("counted")
def test_sizes_that_keep_the_promise_report_nothing(eager: Run) -> None:
    words = ("run", "counted:branching", *NINE_TO_63, "--prompt-ids", SEVENTEEN, "--json")
    done = eager(*words, "--batch-size", "1", "--batch-size", "3", "--fail-on-recompile")
    assert (done.code, done.json["recompiles"]) == (0, [])


@pytest.mark.usefixtures("counted")
def test_dropped_guards_are_not_looked_at_unless_one_asks(
    eager: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", "counted:branching", *NINE_TO_63, "--prompt-ids", SIXTEEN, "--json")
    for done in (eager(*words), eager(*words, "--guards", "drop")):
        assert (done.code, done.json["recompiles"]) == (0, [])
    assert eager(*words, "--guards", "drop", "--fail-on-recompile").code == 3
    monkeypatch.setenv("VLLMC_GUARDS", "check")
    assert len(eager(*words).json["recompiles"]) == 1
    wrong = eager(*words, "--guards", "some")
    assert (wrong.code, wrong.error) == (2, "bad-value")


@pytest.mark.usefixtures("counted")
def test_a_hit_in_another_process_has_the_conditions_in_its_record(eager: Run, spawn: Run) -> None:
    assert eager("warm", "counted:branching", *NINE_TO_63[:4]).code == 0
    assert eager("warm", "counted:ticking").code == 0
    words = ("--backend", "eager", "--fail-on-miss", "--fail-on-recompile", "--json")
    sizes = spawn("run", "counted:branching", *NINE_TO_63, "--prompt-ids", SIXTEEN, *words)
    assert (sizes.code, sizes.json["counts"]["hit"]) == (3, 2), sizes.err
    assert [row["class"] for row in sizes.json["recompiles"]] == ["shape"]
    values = spawn("run", "counted:ticking", "--max-new-tokens", "4", *words)
    assert (values.code, values.json["counts"]["hit"]) == (3, 2), values.err
    [row] = values.json["recompiles"]
    assert (row["class"], row["count"]) == ("int", 3)


@pytest.mark.usefixtures("counted")
def test_a_capture_that_leaves_a_promise_warns_of_it_once(eager: Run) -> None:
    words = ("warm", "counted:branching", *NINE_TO_63[:4])
    warned = eager(*words)
    assert "warning[guards-dropped]: " in warned.err
    assert "only where tokens % 8 != 0" in warned.err
    assert "vllmc run --guards check" in warned.err
    assert "warning" not in eager(*words).err
    for kind in ("backed", "unbacked"):
        assert "warning" not in eager("warm", "counted:ticking", "--dynamic-shapes", kind).err


@pytest.mark.usefixtures("counted")
def test_unbacked_as_the_fix_says_names_the_line_that_branches(eager: Run) -> None:
    done = eager("run", "counted:branching", "--json")
    assert done.code == 1
    assert done.json["error"]["context"]["source"] == "if x.shape[1] % 8 == 0:"


@pytest.mark.parametrize("kind", ["unbacked", "backed", "backed-size-oblivious"])
@pytest.mark.usefixtures("counted")
def test_a_counter_that_the_workload_moves_on_is_reported(eager: Run, kind: str) -> None:
    words = ("run", "counted:ticking", "--dynamic-shapes", kind, "--json")
    done = eager(*words, "--max-new-tokens", "4", "--fail-on-recompile")
    assert done.code == 3
    [row] = done.json["recompiles"]
    assert (row["class"], row["guard"]) == ("int", "counted.VALUE == 0")
    assert (row["subject"], row["expected"], row["observed"]) == ("counted.VALUE", "0", "1")
    assert (row["count"], row["cost_seconds"], row["dropped"]) == (3, None, True)
    assert row["pattern"] == "a counter that grows by one, from 0 to 3"
    assert row["fix"].startswith('self.register_buffer("VALUE", torch.tensor(counted.VALUE)')


@pytest.mark.parametrize(
    ("value", "change", "use", "klass", "guard", "observed"),
    [
        ("'plain'", "'fancy'", "len(VALUE)", "string", "== 'plain'", "'fancy'"),
        ("True", "False", "(2 if VALUE else 3)", "other", "== True", "False"),
        ("None", "7", "(2 if VALUE is None else 3)", "type", "is None", "7"),
        ("1.5", "2.5", "VALUE", "other", "== 1.5", "2.5"),
        (
            "first", "second", "VALUE(2)",
            "object-id", "== function counted.first", "function counted.second",
        ),
        ("[2, 3]", "[2, 4]", "(VALUE[0] + VALUE[1])", "int", "[1] == 3", "4"),
    ],
)  # fmt: skip
def test_a_constant_of_any_kind_that_the_workload_changes_is_reported(
    write: Callable[..., None],
    eager: Run,
    value: str,
    change: str,
    use: str,
    klass: str,
    guard: str,
    observed: str,
) -> None:
    write(value=value, change=change, use=use)
    done = eager("run", "counted:ticking", "--guards", "check", "--max-new-tokens", "3", "--json")
    assert done.code == 0, done.err
    [row] = done.json["recompiles"]
    assert (row["class"], row["observed"], row["count"]) == (klass, observed, 2)
    assert row["guard"].startswith("counted.VALUE")
    assert row["guard"].endswith(guard)


def test_what_does_not_change_is_not_reported(write: Callable[..., None], eager: Run) -> None:
    write(value="{'a': [1, 'x' * 300]}", change="{'a': [1, 'x' * 300]}", use="VALUE['a'][0]")
    done = eager("run", "counted:ticking", "--max-new-tokens", "3", "--fail-on-recompile", "--json")
    assert (done.code, done.json["recompiles"]) == (0, [])


@pytest.mark.usefixtures("counted")
def test_the_counter_as_a_tensor_is_no_constant(eager: Run, workplace: Path) -> None:
    (workplace / "cured.py").write_text(CURED)
    words = ("--max-new-tokens", "5", "--guards", "check", "--json")
    broken = eager("run", "cured:counting", *words)
    [row] = broken.json["recompiles"]
    assert row["guard"] == "self.model.model.layers[0].mlp.step == 0"
    assert row["fix"].startswith("self.step = torch.tensor(self.step)  # once")
    cured = eager("run", "cured:cured", *words)
    buffered = eager("run", "cured:buffered", *words)
    assert cured.json["recompiles"] == buffered.json["recompiles"] == []
    [broken_ids, ids, buffered_ids] = (
        done.json["outputs"][0]["token_ids"] for done in (broken, cured, buffered)
    )
    assert ids == buffered_ids
    assert ids != broken_ids, "the program with the constant computed something else"


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
def test_what_inductor_compiled_is_held_against_its_record_too(vllmc: Run, spawn: Run) -> None:
    words = ("--prompt-ids", SIXTEEN, "--json")
    assert vllmc("warm", "counted:branching", *NINE_TO_63[:4]).code == 0
    done = spawn("run", "counted:branching", *NINE_TO_63, *words, "--fail-on-recompile")
    assert (done.code, done.json["counts"]["hit"]) == (3, 2), done.err
    assert [row["guard"] for row in done.json["recompiles"]] == ["input_ids.size()[1] % 8 != 0"]


def test_a_model_of_transformers_alone_breaks_nothing(warmed: Any, eager: Run) -> None:
    done = eager("run", "--max-new-tokens", "3", "--batch-size", "3", "--fail-on-recompile")
    assert done.code == 0


def test_the_page_shows_a_model_and_its_report(eager: Run, workplace: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recompiles.md").read_text(encoding="utf-8")
    section = page.partition("\n## Guards that were dropped\n")[2]
    model, typed, report = re.findall(r"(?s)```(?:python)?\n(.*?)```", section)[:3]
    (workplace / "counted.py").write_text(model)
    done = eager(*shlex.split(typed.replace("\\\n", " "))[1:])
    lines = [line.rstrip() for line in done.out.splitlines()]
    printed = "\n".join(lines[lines.index("recompiles   5") + 2 :])
    # Where Transformers' forward stands is a matter of its version.
    place = re.compile(r"modeling_llama\.py:\d+")
    assert place.sub("", printed) == place.sub("", report.rstrip())
