from __future__ import annotations

import subprocess
import sys

VALIDATORS = """
import sys
from vllmc.core.models.config_classes import import_validators

import_validators()
assert "transformers.activations" not in sys.modules
import transformers.utils.type_validators as validators

import_validators()
assert sys.modules["transformers.utils.type_validators"] is validators

from transformers.activations import ACT2FN

assert "silu" in ACT2FN
del sys.modules["transformers.utils.type_validators"]
import importlib

whole = importlib.import_module("transformers.utils.type_validators")
assert whole is not validators
names = {name for name in vars(whole) if not name.startswith("__")}
assert names == {name for name in vars(validators) if not name.startswith("__")}
for name in names:
    one, other = getattr(validators, name), getattr(whole, name)
    if getattr(one, "__code__", None):
        assert one.__code__ == other.__code__, name
        assert one.__annotations__ == other.__annotations__, name
print("as", len(names))
"""


def test_validators_are_the_whole_module_s_but_for_the_names_of_activations() -> None:
    command = [sys.executable, "-c", VALIDATORS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 10
