import pickle

import torch

from vllmc.core.torch_compat.opaque import is_opaque_value, opaque_type_name
from vllmc.kernels import attention  # noqa: F401  (defines the op)
from vllmc.kernels.layer_name import LAYER_NAME_TYPE, LayerName, encode


def test_layer_names_are_values() -> None:
    assert LayerName("a") == LayerName("a")
    assert hash(LayerName("a")) == hash(LayerName("a"))
    assert LayerName("a") != LayerName("b")
    assert LayerName("a") != "a"
    assert pickle.loads(pickle.dumps(LayerName("a"))) == LayerName("a")


def test_generated_code_can_rebuild_a_layer_name() -> None:
    name = LayerName("model.layers.0.it's")
    text, names = name.__fx_repr__()
    assert eval(text, dict(names)) == name


def test_layer_names_are_opaque_and_strings_are_not() -> None:
    assert is_opaque_value(LayerName("a"))
    assert not is_opaque_value("a")
    assert opaque_type_name(LayerName("a")) == LAYER_NAME_TYPE


def test_the_kind_decides_the_form_of_a_name() -> None:
    assert encode("model.layers.0", "hoisted") == LayerName("model.layers.0")
    assert encode("model.layers.0", "baked") == "model.layers.0"


def test_every_op_of_ours_that_takes_a_layer_s_name_takes_it_hoisted() -> None:
    types: dict[str, set[str]] = {}
    for name in torch._C._dispatch_get_all_op_names():
        op, _, overload = name.partition(".")
        if op.startswith("vllmc::"):
            packet = getattr(torch.ops.vllmc, op.removeprefix("vllmc::"))
            for argument in getattr(packet, overload or "default")._schema.arguments:
                if "name" in argument.name:
                    types.setdefault(op, set()).add(str(argument.type))
    assert "vllmc::unified_attention_with_output" in types
    # The type of every opaque argument.
    assert all("PyObject" in found for found in types.values()), types
