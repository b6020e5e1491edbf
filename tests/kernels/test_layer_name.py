import pickle

from vllmc.core.torch_compat.opaque import is_opaque_value, opaque_type_name
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
