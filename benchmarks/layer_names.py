"""What layer-name strings in an op inside the pieces cost: as strings, and as `LayerName`.

    python benchmarks/layer_names.py [--runs 5] [--json FILE]

Compiles a Llama of 16 layers, in each of which an op of the model's own takes the keys and the
layer's name, into empty caches. Every sample is a fresh process, and the two take turns. Seconds
are those that `vllmc warm --json` gives: imports and building the model once to know its key are
not counted. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import summary, write_report

from vllmc.kernels.layer_name import LAYER_NAME_TYPE, LayerName

LAYERS = 16
WAYS = ("strings", "layer_name")
COMMAND = "from vllmc.cli.app import entry_point; entry_point()"

library = torch.library.Library("bench", "DEF")
library.define("kv_update(Tensor key, str layer_name) -> Tensor")
library.define(f"kv_update.named(Tensor key, {LAYER_NAME_TYPE} layer_name) -> Tensor")
for op in ("kv_update", "kv_update.named"):
    library.impl(op, lambda key, *_: key.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake(f"bench::{op}", lambda key, *_: torch.empty_like(key), lib=library)


class Updated(torch.nn.Module):
    """A projection whose result goes through the op, under the name of its layer."""

    def __init__(self, inner: torch.nn.Module, layer_name: str | LayerName) -> None:
        super().__init__()
        self.inner = inner
        self.layer_name = layer_name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The keys."""
        keys: torch.Tensor = torch.ops.bench.kv_update(self.inner(x), self.layer_name)
        return keys


def make(named: Callable[[str], str | LayerName]) -> torch.nn.Module:
    """A Llama with hidden size 256, whose names are what `named` makes of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=32000,
        )
    )
    for index, layer in enumerate(model.model.layers):
        name = named(f"model.layers.{index}")
        layer.self_attn.k_proj = Updated(layer.self_attn.k_proj, name)
    return model


def strings() -> torch.nn.Module:
    """The model with names as strings."""
    return make(str)


def layer_name() -> torch.nn.Module:
    """The model with names as `LayerName`."""
    return make(LayerName)


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    samples: dict[str, list[dict[str, float]]] = defaultdict(list)
    for run in range(options.runs):
        for way in WAYS:
            sample = in_fresh_process(way)
            samples[way].append(sample)
            print(f"run {run}, {way}: {sample}", file=sys.stderr, flush=True)
    rows = [{"way": way, **summary(group)} for way, group in samples.items()]
    print(table(rows))
    if options.json:
        write_report(options.json, options.runs, rows)


def in_fresh_process(way: str) -> dict[str, float]:
    """One cold `vllmc warm` of the model, with all caches empty."""
    with tempfile.TemporaryDirectory() as caches:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, "warm", f"layer_names:{way}", "--json", "-q"],
            env={
                **os.environ,
                "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
                "TRITON_CACHE_DIR": f"{caches}/triton",
                "VLLMC_CACHE_DIR": f"{caches}/vllmc",
            },
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    row = json.loads(done.stdout)
    artifacts = {unit["artifact"]: unit["bytes"] for unit in row["units"]}
    told = row["layer_names"] or {"seconds": 0.0, "bytes": 0}
    return {
        "total": row["seconds"]["total"],
        "compile": row["seconds"]["compile"],
        "artifacts": len(artifacts),
        "bytes": sum(artifacts.values()),
        "told_seconds": told["seconds"],
        "told_bytes": told["bytes"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| names as | cold | of it compiling | artifacts | size | what `warm` says they cost |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["total_spread"]
        told = f"{row['told_seconds']:.2f} s, {row['told_bytes'] / 1e6:.2f} MB"
        lines.append(
            f"| {row['way']} | {row['total']:.2f} s ({low:.2f} to {high:.2f}) "
            f"| {row['compile']:.2f} s | {row['artifacts']:.0f} | {row['bytes'] / 1e6:.2f} MB "
            f"| {told if row['told_bytes'] else 'nothing'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
