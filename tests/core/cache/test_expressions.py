from __future__ import annotations

import pytest

from vllmc.core.cache.expressions import most_telling, spoken


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("M['pkg.mod'].SIZE", "pkg.mod.SIZE"),
        ("M['pkg.mod'].TABLE['a'][0]", "pkg.mod.TABLE['a'][0]"),
        ("L['self']._modules['model']._modules['0'].training", "self.model[0].training"),
        ("L['self']._modules['a']._buffers['scale']", "self.a.scale"),
        ("dict(type(M['m'].options).__dict__)['ratio']", "type(m.options).ratio"),
        ("O['mine::scale']", "torch.ops.mine.scale"),
        ("vars(M['m'])['ratio']", "m.ratio"),
        ("M['m'].os.environ._data[b'HOME']", "m.os.environ['HOME']"),
        ("type(L['self'])", "type(self)"),
        ("dict(M['m'].TABLE)['a']", "dict(m.TABLE)['a']"),
        ("list(dict.keys(M['m'].TABLE))[0]", "list(dict.keys(m.TABLE))[0]"),
        ("M['m'].f.__defaults__[0]", "m.f.__defaults__[0]"),
        ("not python", "not python"),
        ("(", "("),
    ],
)
def test_an_expression_is_told_as_a_person_would_write_it(expression: str, words: str) -> None:
    assert spoken(expression) == words


def test_what_holds_another_that_changed_is_left_out() -> None:
    assert most_telling(["m.T", "m.T['a']", "type(m.T['a'])", "m.U"]) == ["type(m.T['a'])", "m.U"]
