"""A model with an op of its own that takes the layer's name, as users write them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig

Run = Callable[..., Any]
SILU = ("--splitting-op", "torch.nn.functional.silu")
ATTENTION = "vllmc::unified_attention_with_output"

MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
{imports}

GAINS = {{f"model.layers.{{index}}": 1.0 + index for index in range(8)}}


{declaration}


class Gained(torch.nn.Module):
    def __init__(self, inner, name):
        super().__init__()
        self.inner = inner
        {attribute}

    def forward(self, x):
        return torch.ops.{namespace}.gain(self.inner(x), self.layer_name)


def make(layers=4):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
            initializer_range=0.3, eos_token_id=None, bos_token_id=None,
        )
    )
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj = Gained(layer.self_attn.v_proj, f"model.layers.{{index}}")
    return model


def deeper():
    return make(layers=6)
"""

# Layers of which each is compiled, or all in one.
COMPILED = """
import torch

library = torch.library.Library("by_layer", "DEF")
library.define("update(Tensor x, str layer_name) -> Tensor")
library.impl("update", lambda x, layer_name: x.clone(), "CPU")
torch.library.register_fake(
    "by_layer::update", lambda x, layer_name: torch.empty_like(x), lib=library
)


class Layer(torch.nn.Module):
    def __init__(self, index):
        super().__init__()
        self.layer_name = f"model.layers.{index}.self_attn"

    def forward(self, x):
        return torch.ops.by_layer.update(x + 1, self.layer_name)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(map(Layer, range(12)))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


model = Model()
for module in WHAT:
    module.compile(backend="eager")
for _ in range(2):
    model(torch.ones(4))
"""

BY_SCHEMA = """
def gain(x, layer_name):
    return x * GAINS[{text}]


library = torch.library.Library("{namespace}", "DEF")
{define}
library.impl("gain", gain, "CompositeExplicitAutograd")
torch.library.register_fake(
    "{namespace}::gain", lambda x, layer_name: torch.empty_like(x), lib=library
)
"""

BY_SIGNATURE = """
@torch.library.custom_op("{namespace}::gain", mutates_args=())
def gain(
    x: torch.Tensor,
    {annotation}
) -> torch.Tensor:
    return x * GAINS[{text}]


gain.register_fake(lambda x, layer_name: torch.empty_like(x))
"""


def write(workplace: Path, name: str, way: str = "schema", fix: str = "") -> None:
    """The module `name` of the model; with a `fix`, that is pasted where it says."""
    form = {"schema": BY_SCHEMA, "signature": BY_SIGNATURE}[way]
    imports, declared, attribute = fix.splitlines() or ["", "", "self.layer_name = name"]
    declaration = form.format(
        namespace=name,
        define=declared or 'library.define("gain(Tensor x, str layer_name) -> Tensor")',
        annotation=declared or "layer_name: str",
        text="layer_name.value" if fix else "layer_name",
    )
    # The fix shows the name of one layer.
    attribute = re.sub(r"'model\.layers\.\d'", "name", attribute)
    (workplace / f"{name}.py").write_text(
        MODEL.format(imports=imports, declaration=declaration, attribute=attribute, namespace=name)
    )


def outputs(vllmc: Run, name: str) -> Any:
    """What the model generates, with log-probabilities, which show any other gain."""
    words = ("--prompt-ids", "1,2,3", "--max-new-tokens", "4", "--logprobs", "2", "--json")
    return vllmc("run", f"{name}:make", *words).json["outputs"]


@pytest.mark.parametrize("way", ["schema", "signature"])
def test_the_fix_of_a_user_s_op_is_proven(way: str, eager: Run, workplace: Path) -> None:
    before, after = f"strings_{way}", f"names_{way}"
    write(workplace, before, way)
    row = eager("warm", f"{before}:make", "--json").json
    found = row["layer_names"]
    assert row["pieces"]["unique"] == found["unique"] == 5
    assert found["would_be"] == 3
    [op] = found["ops"]
    assert (op["op"], op["argument"]) == (f"{before}::gain", "layer_name")
    assert (op["values"], op["examples"]) == (3, ["model.layers.1", "model.layers.3"])
    assert op["pieces"] == ["piece_2", "piece_4", "piece_6"]
    write(workplace, after, way, op["fix"])
    cured = eager("warm", f"{after}:make", "--json").json
    assert cured["layer_names"] is None
    assert cured["pieces"]["unique"] == found["would_be"]
    assert outputs(eager, before) == outputs(eager, after)


def test_the_cost_is_that_of_the_units_beyond_the_first(eager: Run, workplace: Path) -> None:
    write(workplace, "strings_cost")
    row = eager("warm", "strings_cost:make", "--compile-size", "4", "--json").json
    extra = [unit for unit in row["units"] if unit["pieces"][0] in ("piece_4", "piece_6")]
    found = row["layer_names"]
    assert found["compiled"] == len(extra) == 4
    assert found["seconds"] == pytest.approx(sum(unit["seconds"] for unit in extra), abs=1e-3)
    # The eager backend writes the same for every range of a piece.
    sizes = {unit["artifact"]: unit["bytes"] for unit in extra}
    assert found["bytes"] == sum(sizes.values()) > 0
    assert (
        eager("warm", "strings_cost:make", "--compile-size", "4", "--json").json["layer_names"]
        is None
    ), "nothing is captured when the program is found"


def test_units_that_were_stored_before_cost_their_bytes(eager: Run, workplace: Path) -> None:
    write(workplace, "strings_deep")
    eager("warm", "strings_deep:make")
    found = eager("warm", "strings_deep:deeper", "--json").json["layer_names"]
    assert (found["unique"], found["would_be"], found["compiled"]) == (7, 3, 2)
    stored = eager("warm", "strings_deep:deeper", "--force", "--json").json
    assert stored["layer_names"]["bytes"] == found["bytes"]
    assert stored["layer_names"]["compiled"] == 4


def test_a_name_in_a_splitting_op_costs_nothing(eager: Run, workplace: Path) -> None:
    write(workplace, "strings_split")
    ops = ("--splitting-op", ATTENTION, "--splitting-op", "strings_split::gain")
    row = eager("warm", "strings_split:make", *ops, "--json").json
    assert row["layer_names"] is None
    assert row["pieces"]["unique"] < row["pieces"]["compilable"]


@pytest.mark.parametrize("layers", ["3", pytest.param("6", marks=pytest.mark.thorough)])
def test_our_own_op_costs_only_baked_and_inside_a_piece(eager: Run, layers: str) -> None:
    rows = {
        (names, ops): eager("warm", "--layers", layers, "--layer-names", names, *ops, "--json").json
        for names in ("hoisted", "baked")
        for ops in (SILU, ())
    }
    unique = {key: row["pieces"]["unique"] for key, row in rows.items()}
    grown = int(layers) + 1
    assert unique == {
        ("hoisted", SILU): 3,
        ("baked", SILU): grown,
        ("hoisted", ()): 3,
        ("baked", ()): 3,
    }
    found = rows["baked", SILU]["layer_names"]
    assert [key for key, row in rows.items() if row["layer_names"]] == [("baked", SILU)]
    assert (found["unique"], found["would_be"]) == (grown, 3)
    [op] = found["ops"]
    assert (op["op"], op["argument"]) == (ATTENTION, "layer_name")
    assert op["fix"] == "--layer-names hoisted"


@pytest.fixture
def mixture(workplace: Path) -> Path:
    """The configuration of a mixture of twelve layers."""
    MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    ).save_pretrained(workplace / "mixture")
    return workplace / "mixture"


@pytest.mark.parametrize("layers", [2, pytest.param(12, marks=pytest.mark.thorough)])
def test_mixtures_of_experts_cost_a_piece_a_layer_unless_their_names_are_hoisted(
    eager: Run, mixture: Path, layers: int
) -> None:
    hoisted, baked, inputs = (
        eager("warm", mixture, "--layers", layers, "--layer-names", names, *more, "--json").json
        for names, more in (
            ("hoisted", ()),
            ("baked", ()),
            ("baked", ("--experts", "grouped_mm")),
        )
    )
    assert [row["pieces"]["unique"] for row in (hoisted, baked, inputs)] == [3, layers + 1, 3]
    assert hoisted["layer_names"] is inputs["layer_names"] is None
    if layers == 2:
        # The first piece and the last differ from the one between them anyway.
        assert baked["layer_names"] is None
        return
    found = baked["layer_names"]
    assert (found["unique"], found["would_be"]) == (13, 3)
    [op] = found["ops"]
    assert (op["op"], op["argument"]) == ("vllmc::fused_moe", "layer_name")
    assert op["values"] == 11
    assert op["fix"] == "--layer-names hoisted"


def test_a_person_is_told_the_cost_and_the_cure(eager: Run, workplace: Path) -> None:
    write(workplace, "strings_told")
    page = workplace / "summary.md"
    said = eager("warm", "strings_told:make", "--summary", page).out
    for text in (said, page.read_text()):
        assert "layer-name strings made 5 pieces unique that would otherwise be 3: 2 more" in text
        assert "strings_told::gain, argument layer_name: 3 strings, 'model.layers.1' to" in text
        assert "LAYER_NAME_TYPE} layer_name) -> Tensor" in text
    assert "layer-name" not in eager("warm", "strings_told:make").out


@pytest.mark.thorough
@pytest.mark.slow
def test_what_inductor_spent_on_strings_is_measured(vllmc: Run, workplace: Path) -> None:
    before, after = "strings_inductor", "names_inductor"
    write(workplace, before)
    row = vllmc("warm", f"{before}:make", "--json").json
    found = row["layer_names"]
    assert (found["unique"], found["would_be"], found["compiled"]) == (5, 3, 2)
    extra = [unit for unit in row["units"] if unit["pieces"][0] in ("piece_4", "piece_6")]
    assert found["seconds"] == pytest.approx(sum(u["seconds"] for u in extra), abs=1e-3) != 0
    assert found["bytes"] == sum(unit["bytes"] for unit in extra) != 0
    write(workplace, after, fix=found["ops"][0]["fix"])
    cured = vllmc("warm", f"{after}:make", "--json").json
    assert (cured["layer_names"], cured["pieces"]["unique"]) == (None, 3)
    assert outputs(vllmc, before) == outputs(vllmc, after)


def test_the_page_s_model_is_cured_by_the_page_s_diff(eager: Run, workplace: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "layer-names.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [diff] = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
    (workplace / "named.py").write_text(code)
    found = eager("warm", "named:model", "--json").json["layer_names"]
    assert (found["unique"], found["would_be"]) == (9, 3)
    assert all(line in page for line in found["ops"][0]["fix"].splitlines())
    imports, *added = re.findall(r"^\+(.*)", diff, re.MULTILINE)
    for old, new in zip(re.findall(r"^-(.*)", diff, re.MULTILINE), added, strict=True):
        assert old in code
        code = code.replace(old, new)
    # In this process, the ops of the other module are registered already.
    (workplace / "cured.py").write_text(f"{imports}\n{code}".replace("myops", "cured_ops"))
    cured = eager("warm", "cured:model", "--json").json
    assert (cured["layer_names"], cured["pieces"]["unique"]) == (None, 3)


@pytest.mark.parametrize("given", ["LayerName(self.layer_name)", "SHARED"])
def test_a_layer_name_that_no_module_holds_is_refused(
    eager: Run, workplace: Path, given: str
) -> None:
    name = f"held_by_{given.partition('(')[0].lower()}"
    fix = (
        "from vllmc.kernels.layer_name import LAYER_NAME_TYPE, LayerName; SHARED = LayerName('a')\n"
        'library.define(f"gain(Tensor x, {LAYER_NAME_TYPE} layer_name) -> Tensor")\n'
        "self.layer_name = name"
    )
    write(workplace, name, fix=fix)
    module = workplace / f"{name}.py"
    module.write_text(module.read_text().replace("(x), self.layer_name)", f"(x), {given})"))
    done = eager("warm", f"{name}:make")
    assert (done.code, done.error) == (1, "unsupported-model")
    assert "attribute of the module" in done.err


def recompiles(vllmc: Run, workplace: Path, what: str) -> Any:
    """What the report says of the program that compiles `what`."""
    program, log = workplace / "program.py", workplace / "program.log"
    program.write_text(COMPILED.replace("WHAT", what))
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, program],
            env={**os.environ, "TORCH_LOGS": "recompiles"},
            stderr=file,
            check=True,
        )
    return vllmc("recompiles", log, "--json").json["recompiles"], vllmc("recompiles", log).out


def test_layers_compiled_one_by_one_are_said_to_run_eager_and_how_not_to(
    vllmc: Run, workplace: Path
) -> None:
    [row], said = recompiles(vllmc, workplace, "model.layers")
    assert (row["class"], row["subject"]) == ("string", "self.layer_name")
    assert (row["count"], row["pattern"], row["limit_hit"]) == (8, "one per layer", True)
    assert "the recompile limit was hit: eager since then" in said
    assert row["fix"].startswith("compile the function that calls forward (program.py:")
    assert recompiles(vllmc, workplace, "[model]")[0] == []
