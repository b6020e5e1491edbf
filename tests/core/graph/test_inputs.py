from __future__ import annotations

import pytest
import torch

from vllmc.core.errors import VllmcError
from vllmc.core.graph.inputs import find_attribute, read_source
from vllmc.core.graph.layout import GraphInput


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("L['input_ids']", GraphInput(kind="activation", name="input_ids")),
        ("L['input_ids'].size()[1]", GraphInput(kind="size", name="input_ids", dim=1)),
        ("L['hidden']['a'][0]", GraphInput(kind="activation", name="hidden['a'][0]")),
        (
            "L['self']._modules['model']._parameters['weight']",
            GraphInput(kind="attribute", name="model.weight"),
        ),
        (
            "L['self']._modules['layers']._modules['0']._buffers['inv_freq']",
            GraphInput(kind="attribute", name="layers.0.inv_freq"),
        ),
        ("L['self'].names[2]", GraphInput(kind="attribute", name="names.2")),
        ("L['self'].table['a key']", GraphInput(kind="attribute", name="table.a key")),
    ],
)
def test_sources_are_read(source: str, expected: GraphInput) -> None:
    assert read_source(source, {"input_ids", "hidden['a'][0]"}) == expected


@pytest.mark.parametrize(
    "source", ["G['TABLE']", "L['input_ids'].grad", "L['self'].make()", "L['self'] + 1"]
)
def test_a_source_that_no_other_process_finds_is_refused(source: str) -> None:
    with pytest.raises(VllmcError) as caught:
        read_source(source)
    assert caught.value.code == "unsupported-model"


def test_attributes_indices_and_keys_are_found() -> None:
    module = torch.nn.Module()
    module.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    module.table = {"a": [torch.ones(1)]}
    assert find_attribute(module, "layers.0.weight") is module.layers[0].weight
    assert find_attribute(module, "table.a.0") is module.table["a"][0]
    for missing in ("layers.1.weight", "table.b", "table.a.1", "nothing"):
        with pytest.raises(KeyError):
            find_attribute(module, missing)
