"""A model in a package of its own, of which everything can change: what a prediction is tried on.

A `State` is all that decides what is compiled: the text of the source files, the Python values
that they read, the spec, torch's own settings. `attempt` puts it in force, predicts, and then
really warms.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from transformers.models.llama import modeling_llama

from vllmc.core.cache.record import ProgramRecord
from vllmc.core.cache.store import Store
from vllmc.core.errors import VllmcError
from vllmc.core.events import SilentObserver
from vllmc.core.graph.layout import Layout
from vllmc.core.job import Job, make_job
from vllmc.core.models.attention import ATTENTION_NAME, register_attention
from vllmc.core.models.resolve import resolve
from vllmc.core.pipeline import Ready, obtain_program, open_program
from vllmc.core.prediction import Prediction, predict
from vllmc.core.spec import ATTENTION_OP, CompileRange, CompileSpec
from vllmc.kernels.forward_context import (
    AttentionMetadata,
    ForwardContext,
    SequenceSpan,
    forward_context,
)
from vllmc.kernels.kv_cache import BlockTable, KVCacheSpec, LayerCache

TOKENS = 6
_CONFIGS = {"inductor": torch._inductor.config, "functorch": torch._functorch.config}

_SETTINGS = """
import collections
import dataclasses
import enum
import json
import types
from functools import partial
from pathlib import Path

import torch

# {comment}

def relu(x):
    return x.relu()

def square(x):
    return x * x

class Options:
    pass

def scale(x, amount=0.0, *, more=0.0):
    return x * amount + more

def closure(amount):
    def inner(x):
        return x * amount
    return inner

def default(amount):
    def inner(x, amount=amount):
        return x * amount
    return inner

def keyword_default(amount):
    def inner(x, *, amount=amount):
        return x * amount
    return inner

class Scaler:
    def __init__(self, amount):
        self.amount = amount

    def __call__(self, x):
        return x * self.amount

    def apply(self, x):
        return x * self.amount

    @property
    def doubled(self):
        return self.amount * 2

class Slotted:
    __slots__ = ("amount",)

    def __init__(self, amount):
        self.amount = amount

class Mode(enum.Enum):
    ONE = 1
    TWO = 2

@dataclasses.dataclass(frozen=True)
class Frozen:
    amount: float

Named = collections.namedtuple("Named", ["amount"])

class Found:
    def __init__(self, amount):
        self.amounts = dict(amount=amount)

    def __getattr__(self, name):
        return self.__dict__["amounts"][name]

def forwarding(amount):
    module = torch.nn.ReLU()
    if amount == 2:
        module.forward = square
    return module

def labelled(amount):
    def function(x):
        return x
    if amount == 2:
        function.amount = 3.0
    return function

def subclass(amount):
    class Made(Scaler):
        extra = amount
    return Made

class One:
    def apply(self, x):
        return x + 1

class Two:
    def apply(self, x):
        return x + 2

def picked(kind, amount):
    one = amount == 1
    return dict(
        none=lambda: None,
        lambda_=lambda: (lambda x: x * 2) if one else (lambda x: x * 3),
        closure=lambda: closure(amount),
        default=lambda: default(amount),
        keyword_default=lambda: keyword_default(amount),
        partial=lambda: partial(scale, amount=amount),
        partial_of_partial=lambda: partial(partial(scale, amount=2), more=amount),
        method=lambda: Scaler(amount).apply,
        callable=lambda: Scaler(amount),
        function=lambda: torch.nn.functional.relu if one else torch.nn.functional.gelu,
        op=lambda: torch.ops.aten.relu.default if one else torch.ops.aten.silu.default,
        builtin=lambda: torch.sin if one else torch.cos,
        module=lambda: torch.nn.ReLU() if one else torch.nn.GELU(),
        property=lambda: Scaler(amount),
        slotted=lambda: Slotted(amount),
        enum=lambda: Mode(amount),
        enum_value=lambda: Mode(amount),
        frozen=lambda: Frozen(amount),
        named=lambda: Named(amount),
        class_attribute=lambda: subclass(amount),
        instance_of=lambda: One() if one else Two(),
        length=lambda: ["a"] * amount,
        member=lambda: {{"a", "b"}} if one else {{"b"}},
        text=lambda: "gelu_tanh" if one else "relu",
        keys=lambda: {{"a": 1.0}} if one else {{"b": 1.0}},
        nested=lambda: {{"a": [{{"b": (1.0, amount)}}]}},
        ordered=lambda: {{"a": 1.0, "b": 2.0}} if one else {{"b": 2.0, "a": 1.0}},
        number=lambda: amount,
        true=lambda: True if one else 1,
        zero=lambda: 0.0 if one else -0.0,
        dtype=lambda: torch.float64 if one else torch.float16,
        slice=lambda: slice(0, amount),
        string_getattr=lambda: "relu" if one else "sigmoid",
        class_defined_twice=lambda: Twice(),
        function_defined_twice=lambda: None,
        text_or_dtype=lambda: "torch.float32" if one else torch.float32,
        list_or_tuple=lambda: [1] if one else (1,),
        tuple_or_named=lambda: (1,) if one else Named(1),
        key_or_text=lambda: {{1: 2.0}} if one else {{"1": 2.0}},
        infinite=lambda: "inf" if one else float("inf"),
        replaced=lambda: None,
        op_composed=lambda: None,
        op_for_a_device=lambda: None,
        op_of_a_function=lambda: None,
        hook=lambda: (lambda m, args, out: out * 2) if one else (lambda m, args, out: out * 3),
        absent=lambda: types.SimpleNamespace() if one else types.SimpleNamespace(amount=3.0),
        absent_in_class=lambda: type("Made", (), dict() if one else dict(amount=3.0)),
        absent_in_function=lambda: labelled(amount),
        one_object=lambda: [options, Options() if one else options],
        own_lookup=lambda: Found(amount),
        own_forward=lambda: forwarding(amount),
    ).get(kind, lambda: None)()

def prepare(toy, kind, one):
    # What a kind changes in the model itself.
    if kind == "hook":
        toy.norm.register_forward_hook(PICKED)
    toy.first, toy.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    toy.table = torch.ones(8)
    if kind == "own_absent" and not one:
        toy._gain = Scaler(3.0)
    if kind == "tied" and not one:
        toy.second.weight = toy.first.weight
    if kind == "shared":
        toy.other = toy.table if one else torch.ones(8)
    if kind == "no_parameter" and not one:
        toy.register_parameter("extra", None)
    if kind == "strides" and not one:
        toy.first.weight.data = torch.ones(8, 8).t()
    if kind == "table_dtype" and not one:
        toy.table = toy.table.to(torch.int32)
    if kind == "table_shape" and not one:
        toy.table = toy.table[None]
    if kind == "table_grad" and not one:
        toy.table.requires_grad_()

values = json.loads(Path(__file__).with_name("values.json").read_text())

if values["amount"] == 1:
    class Twice:
        def apply(self, x):
            return x * 2

    def twice(x):
        return x * 2
else:
    class Twice:
        def apply(self, x):
            return x * 3

    def twice(x):
        return x * 3

if (values["picked"], values["amount"]) == ("absent_global", 2):
    GAIN = 2.0

if values["picked"] == "op_of_a_function":
    if values["amount"] == 1:
        @torch.library.custom_op("foretold::op_of_a_function", mutates_args=())
        def custom(x: torch.Tensor) -> torch.Tensor:
            return x * 2
    else:
        @torch.library.custom_op("foretold::op_of_a_function", mutates_args=())
        def custom(x: torch.Tensor) -> torch.Tensor:
            return x * 3
    custom.register_fake(lambda x: torch.empty_like(x))
elif values["picked"] in ("op_composed", "op_for_a_device"):
    from foretold_toy import ops

options = Options()
options.ratio = values["ratio"]
ACTIVATION = dict(relu=relu, square=square, abs=abs)[values["activation"]]
MULTIPLIER = values["multiplier"]
TERMS = tuple(values["terms"])
TABLE = dict(bias=values["bias"], unread=values["unread"])
LAYERS = values["layers"]
PICKED = picked(values["picked"], values["amount"])
"""

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "torch_dtype": "float32",
}

_MODEL = """
import os

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from foretold_toy import settings
from foretold_toy.parts import mix


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        q = self.linear(x).unflatten(-1, (2, 4)).transpose(1, 2)
        out, _ = ALL_ATTENTION_FUNCTIONS["{attention}"](self, q, q, q, None)
        return out.flatten(2)


class Block(torch.nn.Module):
    gain = {class_gain}

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.attention = Attention()
        self.shift = {instance_shift}

    def forward(self, x):
        x = self.attention(mix(self.linear(x)) * self.gain)
        if settings.options.ratio > 1:
            x = x * settings.options.ratio
        for term in settings.TERMS:
            x = x + term
        return settings.ACTIVATION(x) + self.shift


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = modeling_llama.LlamaRMSNorm(8)
        settings.prepare(self, settings.values["picked"], settings.values["amount"] == 1)
        self.embedding = torch.nn.Embedding(32, 8)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(settings.LAYERS))

    def forward(self, input_ids, position_ids):
        x = self.embedding(input_ids) * settings.MULTIPLIER
        for block in self.blocks:
            x = block(x)
        if os.environ.get("FORETOLD_TOY") == "1":
            x = x - 1
        {use}
        return x + settings.TABLE["bias"] + torch.ones(8)
"""

_CALLED = "x = settings.PICKED(x)"
PICKED = {
    "none": "pass",
    **dict.fromkeys(("lambda_", "closure", "default", "keyword_default", "partial"), _CALLED),
    **dict.fromkeys(("partial_of_partial", "method", "callable", "function"), _CALLED),
    **dict.fromkeys(("op", "builtin", "module"), _CALLED),
    **dict.fromkeys(["slotted", "frozen", "named"], "x = x * settings.PICKED.amount"),
    "property": "x = x * settings.PICKED.doubled",
    "enum": "x = x * 2 if settings.PICKED is settings.Mode.ONE else x * 3",
    "enum_value": "x = x * settings.PICKED.value",
    "class_attribute": "x = x * settings.PICKED.extra",
    "instance_of": "x = settings.PICKED.apply(x)",
    "length": "x = x * len(settings.PICKED)",
    "member": "x = x * 2 if 'a' in settings.PICKED else x * 3",
    "text": "x = x * 2 if 'gelu' in settings.PICKED else x * 3",
    "keys": "x = x * 2 if 'a' in settings.PICKED else x * 3",
    "nested": "x = x * settings.PICKED['a'][0]['b'][1]",
    "ordered": "x = x * list(settings.PICKED.values())[0]",
    "number": "x = x * settings.PICKED",
    "true": "x = x * 2 if settings.PICKED is True else x * 3",
    "zero": "x = x.relu() * settings.PICKED + 1e-30 / (x.relu() * settings.PICKED)",
    "dtype": "x = x.to(settings.PICKED).to(x.dtype) * 3",
    "slice": "x = x + x[..., settings.PICKED].sum(-1, keepdim=True)",
    "class_defined_twice": "x = settings.PICKED.apply(x)",
    "function_defined_twice": "x = settings.twice(x)",
    "text_or_dtype": "x = x * 2 if isinstance(settings.PICKED, str) else x * 3",
    "list_or_tuple": "x = x * 2 if isinstance(settings.PICKED, tuple) else x * 3",
    "tuple_or_named": "x = x * 2 if hasattr(settings.PICKED, 'amount') else x * 3",
    "key_or_text": "x = x * 2 if 1 in settings.PICKED else x * 3",
    "infinite": "x = x * 2 if settings.PICKED == 'inf' else x * 3",
    "replaced": "x = modeling_llama.rotate_half(x) + self.norm(x)",
    "hook": "x = self.norm(x)",
    "op_composed": "x = torch.ops.foretold.op_composed(x)",
    "op_for_a_device": "x = torch.ops.foretold.op_for_a_device(x)",
    "op_of_a_function": "x = torch.ops.foretold.op_of_a_function(x)",
    "string_getattr": "x = getattr(torch, settings.PICKED)(x)",
    "absent": "x = x * getattr(settings.PICKED, 'amount', 2.0)",
    "absent_in_class": "try:\n            x = x * settings.PICKED.amount\n"
    "        except AttributeError:\n            x = x * 2",
    "absent_in_function": "x = x * getattr(settings.PICKED, 'amount', 2.0)",
    "one_object": "x = x * (2 if settings.PICKED[0] is settings.PICKED[1] else 3)",
    "absent_global": "x = x * getattr(settings, 'GAIN', 3.0)",
    "own_absent": "x = x * 2 if hasattr(self, '_gain') else x * 3",
    "own_lookup": "x = x * settings.PICKED.amount",
    "own_forward": _CALLED,
    "tied": "x = self.first(x) * (2 if self.first.weight is self.second.weight else 3)",
    "shared": "x = x * self.table * (2 if self.table is self.other else 3)",
    "no_parameter": "x = x * len(self._parameters)",
    "strides": "x = self.first(x)",
    "table_dtype": "x = x * (self.table * 0.5)",
    "table_shape": "x = x * self.table * self.table.dim()",
    "table_grad": "x = x * self.table * (2 if self.table.requires_grad else 3)",
    "replaced_in_torch": "x = torch.nn.functional.silu(torch.relu(x))",
    "set_in_torch": "x = x * torch.set_by_foretold",
}
"""How `forward` uses `settings.PICKED`, by the kind of Python value that it is."""

_OPS = """
import torch

library = torch.library.Library("foretold", "FRAGMENT")
tags = torch.Tag.pt2_compliant_tag
library.define("op_composed(Tensor x) -> Tensor", tags=tags)
library.define("op_for_a_device(Tensor x) -> Tensor", tags=tags)
library.impl("op_composed", lambda x: x * 2 + {amount}, "CompositeImplicitAutograd")
library.impl("op_for_a_device", lambda x: x * 2 + {amount}, "CPU")
library.impl("op_for_a_device", lambda x: torch.empty_like(x), "Meta")
"""

_PARTS = """
def mix(x, amount={default}):
    return x * {literal} + amount
"""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class State:
    """All that decides what is compiled; the defaults are what most examples share.

    With `llama`, changes of a tiny configuration of Transformers, that is the model, and not the
    package.
    `environment` is vllmc's, `variables` are the process's own. `place` is the thread that warms:
    that of the prediction, another that predicts too, or another that only warms.
    """

    llama: tuple[tuple[str, Any], ...] | None = None
    comment: str = ""
    ratio: float = 1.0
    activation: Literal["relu", "square", "abs"] = "relu"
    multiplier: float = 1.0
    terms: tuple[float, ...] = ()
    bias: float = 0.5
    unread: int = 0
    layers: int = 1
    picked: str = "none"
    amount: int = 1
    class_gain: float = 1.0
    instance_shift: float = 0.0
    default: float = 0.0
    literal: float = 2.0
    dtype: str = "float32"
    ranges: tuple[tuple[int, int], ...] = ((1, 8),)
    sizes: tuple[int, ...] = ()
    dynamic_shapes: str = "unbacked"
    layer_names: str = "hoisted"
    cuts: tuple[str, ...] = ()
    backend: str = "eager"
    options: tuple[tuple[str, Any], ...] = ()
    config: tuple[tuple[str, str, Any], ...] = ()
    torch_state: tuple[tuple[str, Any], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    place: Literal["here", "worker", "apart"] = "here"

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return (
            f"State({', '.join(f'{n}={value!r}' for n, value, usual in given if value != usual)})"
        )

    @property
    def spec(self) -> CompileSpec:
        """The spec of the job."""
        return CompileSpec(
            dtype=self.dtype,
            ranges=tuple(CompileRange(*ends) for ends in self.ranges),
            sizes=self.sizes,
            dynamic_shapes=self.dynamic_shapes,  # type: ignore[arg-type]
            layer_names=self.layer_names,  # type: ignore[arg-type]
            splitting_ops=(ATTENTION_OP, *self.cuts),
            inductor=tuple(sorted(self.options)),
            backend=self.backend,
        )


_USUAL = State()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What was predicted, and what happened: `ready`, or the `error` that ended it.

    `result` and `expected` are the program's output for six tokens, and the plain module's.
    """

    prediction: Prediction
    ready: Ready | None = None
    error: VllmcError | None = None
    result: torch.Tensor | None = None
    expected: torch.Tensor | None = None

    @property
    def compiled(self) -> int:
        """How many units a compiler was asked for."""
        return sum(unit.outcome != "hit" for unit in self.ready.units) if self.ready else 0


_directories = itertools.count()


def attempt(state: State, root: Path, store: Path) -> Attempt:
    """Predicts under `state`, then warms; `root` takes the package's files.

    Each call has files of its own, as another host would.
    """
    host = root / f"host{next(_directories)}"
    with _imported(state, host), _in_force(state):
        if state.place == "here":
            return _attempt(state, host, store)
        with ThreadPoolExecutor(1) as pool:
            if state.place == "worker":
                return pool.submit(_attempt, state, host, store).result()
            job = _job(state, host)
            prediction = predict(job, Store(store))
            return pool.submit(_warm, job, prediction, store).result()


def attempt_together(states: Sequence[State], root: Path, store: Path) -> list[Attempt]:
    """Attempts each state in a thread of its own, all at once.

    They share the process, so only what a thread has to itself may differ: spec and `config`.
    """
    host = root / f"host{next(_directories)}"
    start = threading.Barrier(len(states))

    def one(state: State) -> Attempt:
        with _configured(state):
            start.wait()
            return _attempt(state, host, store)

    with _imported(states[0], host), ThreadPoolExecutor(len(states)) as pool:
        return [*pool.map(one, states)]


def codes(store: Path, record: ProgramRecord) -> dict[tuple[tuple[str, ...], str], str]:
    """The digest of each unit's generated code, by its pieces and range."""
    found = {}
    for unit in record.units:
        known = Store(store).unit(unit.key)
        assert known is not None
        found[unit.pieces, unit.range] = known.code
    return found


def _attempt(state: State, host: Path, store: Path) -> Attempt:
    job = _job(state, host)
    return _warm(job, predict(job, Store(store)), store)


def _job(state: State, host: Path) -> Job:
    since = time.time()
    register_attention()
    return make_job(
        resolve(
            str(host / "llama") if state.llama is not None else "foretold_toy.model:Toy",
            layers=None,
        ),
        state.spec,
        environment=dict(state.environment),
        cache_dir=Path("/nonexistent"),
        origins={},
        since=since,
    )


def _warm(job: Job, prediction: Prediction, store: Path) -> Attempt:
    try:
        ready = obtain_program(job, Store(store), SilentObserver())
    except VllmcError as error:
        return Attempt(prediction=prediction, error=error)
    entry = job.model.build("real", job.spec)
    args = (torch.arange(TOKENS)[None], torch.arange(TOKENS)[None], torch.arange(3))
    with torch.no_grad(), forward_context(_context(job, ready)):
        return Attempt(
            prediction=prediction,
            ready=ready,
            result=open_program(ready, entry)(*args),
            expected=entry.forward(*args),
        )


def _context(job: Job, ready: Ready) -> ForwardContext:
    """A step of one prompt of six tokens, in empty caches."""
    table = BlockTable.of((0,), TOKENS, "cpu")
    span = SequenceSpan(query_start=0, query_len=TOKENS, total_len=TOKENS, table=table)
    dtype = getattr(torch, job.spec.dtype)
    caches = {
        site.layer: LayerCache.allocate(
            KVCacheSpec(
                layer_name=site.layer,
                num_kv_heads=site.kv_heads,
                key_size=site.key_size,
                value_size=site.value_size,
            ),
            TOKENS,
            dtype=dtype,
            device="cpu",
        )
        for site in Layout.from_json(ready.record.program).attention
    }
    metadata = AttentionMetadata(slots=torch.arange(TOKENS), sequences=(span,))
    return ForwardContext(metadata=metadata, caches=caches)


@contextmanager
def _imported(state: State, directory: Path) -> Iterator[None]:
    """The package's files, written before anything imports them, and found first."""
    values = asdict(state)
    package = directory / "foretold_toy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name, text in (
        ("settings", _SETTINGS),
        ("model", _MODEL),
        ("parts", _PARTS),
        ("ops", _OPS),
    ):
        text = text.format(**values, attention=ATTENTION_NAME, use=PICKED[state.picked])
        (package / f"{name}.py").write_text(text)
    read = (
        "ratio",
        "activation",
        "multiplier",
        "terms",
        "bias",
        "unread",
        "layers",
        "picked",
        "amount",
    )
    (package / "values.json").write_text(json.dumps({name: values[name] for name in read}))
    if state.llama is not None:
        (directory / "llama").mkdir()
        (directory / "llama" / "config.json").write_text(
            json.dumps({**_LLAMA, **dict(state.llama)})
        )
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(directory))
        if (ops := sys.modules.get("foretold_toy.ops")) is not None:
            ops.library._destroy()  # as a process would that ends
        for name in [name for name in sys.modules if name.partition(".")[0] == "foretold_toy"]:
            del sys.modules[name]


def _replaced(x: torch.Tensor) -> torch.Tensor:
    return x * 5


def _replaced_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x * weight[0, 0] + bias


def _replaced_method(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x * 7


@contextmanager
def _configured(state: State) -> Iterator[None]:
    with ExitStack() as stack:
        for group, name, value in state.config:
            stack.enter_context(_CONFIGS[group].patch({name: value}))
        yield


@contextmanager
def _in_force(state: State) -> Iterator[None]:
    setters: Mapping[str, tuple[Any, Any]] = {
        "default_dtype": (torch.set_default_dtype, torch.get_default_dtype),
        "matmul_precision": (
            torch.set_float32_matmul_precision,
            torch.get_float32_matmul_precision,
        ),
        "deterministic": (
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled,
        ),
        "threads": (torch.set_num_threads, torch.get_num_threads),
    }
    with _configured(state), ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if (state.picked, state.amount) == ("replaced", 2):
            # As a package of faster kernels would.
            patch.setattr(modeling_llama, "rotate_half", _replaced)
            patch.setattr(modeling_llama.LlamaRMSNorm, "forward", _replaced_method)
        if (state.picked, state.amount) == ("replaced_in_torch", 2):
            patch.setattr(torch.nn.functional, "linear", _replaced_linear)
        if state.picked == "set_in_torch":
            patch.setattr(torch, "set_by_foretold", state.amount, raising=False)
        for name, value in state.variables:
            patch.setenv(name, value)
        for name, value in state.torch_state:
            put, get = setters[name]
            stack.callback(put, get())
            put(value)
        yield
