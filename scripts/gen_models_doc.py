"""Tries every family of the tests and writes what came out to docs/models.md.

    python scripts/gen_models_doc.py [--only NAME ...]

Takes minutes: each model is compiled with Inductor. With `--only` the page is not written.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"

HEAD = """# Models

<!-- Written by scripts/gen_models_doc.py: change tests/e2e/families.py and
tests/support/encoder_families.py, then run it. -->

vllmc compiles decoder-only Transformers models, and encoders of the families below, whose
attention goes through Transformers' attention interface (`ALL_ATTENTION_FUNCTIONS`). MODEL is one
of:

- `module.path:attribute`: a class, a factory without arguments, or an instance
- a directory with a `config.json`; weights are optional
- a preset: `vllmc models` lists them
- a hub id, `org/name[@revision]`, through the Transformers cache

A model is refused (`unsupported-model`, with the module and line) where it could not run right: a
layer that keeps state outside attention, a mask of its own, a keyword of the attention function
that the attention op does not know, positions that are not the given ones.

## What generates

Each row is a model of two or three layers with random weights in float32. **Same ids**: for
batches of 1, 2 and 7 prompts of different length, the greedy token ids of the compiled program
are those of Transformers' own `generate`, one prompt at a time with eager attention.
"""

ENCODERS = """
## What embeds

Encoders are run with `vllmc run --embed`: their prompts go whole through the program, as one batch
without padding, each token attending to all of its own prompt. Their last compile range has no end
(`1:inf`), since a prompt cannot be run in parts. Only the families below are taken for encoders:
how positions are counted differs between them, and each was compared. One whose configuration says
`is_decoder` is none.

**Same embeddings**: for batches of 1, 2 and 7 prompts of different length, the mean of the last
hidden states is that of eager Transformers, one prompt at a time, within 1e-5.
"""

TAIL = """
## Mixtures of experts

Transformers lets a model choose how it multiplies its experts. Its plain loop over the experts that
were hit cannot be captured, since which they are is known only when it runs. So vllmc chooses its
own op, `vllmc::fused_moe` (`kernels/moe.py`): tokens are sorted by expert, and each expert that was
hit multiplies its group. What a token's experts give is added up in the loop's order, and in
float32, where the loop adds in the model's dtype. The op is inside the compiled pieces and finds
its layer's weights by name: see [what layer names cost](layer-names.md#a-mixture-of-experts).

`--experts grouped_mm` takes Transformers' ops of that name instead, whose weights are inputs of the
graph. They multiply the same, and add up in the order of a token's weights. A model that
normalises what each expert gives needs it; one with a loop of its own is refused either way.

## A module of your own

`module:attribute` may be any module with `forward(input_ids, position_ids)`, `[1, T]` each, that
returns logits `[1, T, vocab]`. A batch holds tokens of several sequences side by side. Attention
that calls the attention op keeps them apart; whatever else mixes tokens (a convolution, a sum over
`T`) would mix sequences, and in a module of your own vllmc does not see that. It does refuse a
forward that leaves something behind in the module.
"""


def main() -> None:
    """Writes the page, or prints the rows of `--only`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[])
    only = parser.parse_args().only
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    families = load_families()
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import encoder_families

    encoders = [f for f in encoder_families.ENCODERS if not only or f.name in only]
    tried = [f for f in families.FAMILIES if not only or f.name in only]
    refused = [f for f in families.REFUSED if not only or f.name in only]
    lines = [
        f"torch {version('torch')}, Transformers {version('transformers')}, on the CPU.",
        "",
        "| family | exercises | pieces | unique | Inductor | eager backend |",
        "|---|---|---:|---:|---|---|",
        *(report(tried_row(families, family)) for family in tried),
        ENCODERS,
        "| family | exercises | pieces | unique | Inductor | eager backend |",
        "|---|---|---:|---:|---|---|",
        *(report(encoder_row(encoder_families, family)) for family in encoders),
        "",
        "## What is refused",
        "",
        "| family | what it is | refused at | because |",
        "|---|---|---|---|",
        *(report(refused_row(families, family)) for family in refused),
    ]
    if not only:
        PAGE.write_text(HEAD + "\n" + "\n".join(lines) + "\n" + TAIL, encoding="utf-8")


def report(row: str) -> str:
    """Shows the row while the next one is worked out."""
    print(row, flush=True)
    return row


def load_families() -> Any:
    """The module tests/e2e/families.py, which is in no package."""
    path = ROOT / "tests" / "e2e" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tried_row(families: Any, family: Any) -> str:
    """Compiles the family with both backends and compares what they generate."""
    from vllmc.core.errors import VllmcError

    with tempfile.TemporaryDirectory() as place:
        directory, cache = Path(place) / "model", Path(place) / "cache"
        model = families.make_model(family)
        model.save_pretrained(directory)
        expected = tuple(families.continuation(model, prompt) for prompt in families.PROMPTS)
        verdicts = {}
        for backend in ("inductor", "eager"):
            try:
                job = families.job_of(directory, cache, backend)
                ready = families.obtain(job, cache)
                ids = families.generated(job, ready)
            except VllmcError as error:
                verdicts[backend] = f"{error.code}: {error.message}"
                continue
            same = ids == {n: expected[:n] for n in families.BATCHES}
            verdicts[backend] = "same ids" if same else "**other ids**"
        pieces = ready.record.pieces
    cells = (
        family.name,
        family.exercises,
        str(pieces["total"]),
        str(pieces["unique"]),
        verdicts["inductor"],
        verdicts["eager"],
    )
    return row(*cells)


def encoder_row(families: Any, family: Any) -> str:
    """Compiles the encoder with both backends and compares what they embed."""
    with tempfile.TemporaryDirectory() as place:
        directory, cache = Path(place) / "model", Path(place) / "cache"
        model = families.save_encoder(family, directory)
        verdicts = {}
        for backend in ("inductor", "eager"):
            job, ready = families.obtain_encoder(directory, cache, backend)
            same = families.same_embeddings(model, families.embeddings(job, ready))
            verdicts[backend] = "same embeddings" if same else "**other embeddings**"
        pieces = ready.record.pieces
    return row(
        family.name,
        family.exercises,
        str(pieces["total"]),
        str(pieces["unique"]),
        verdicts["inductor"],
        verdicts["eager"],
    )


def refused_row(families: Any, refusal: Any) -> str:
    """What vllmc says of a family that it does not run."""
    from vllmc.core.errors import VllmcError

    with tempfile.TemporaryDirectory() as place:
        directory, cache = Path(place) / "model", Path(place) / "cache"
        families.save_config(refusal, directory)
        try:
            families.obtain(families.job_of(directory, cache), cache)
        except VllmcError as error:
            where = error.context.get("module", "its configuration")
            line = error.context.get("line", "")
            said = error.message.partition(": ")[2] or error.message
            at = f"`{where}` {line}".strip()
            return row(refusal.name, refusal.exercises, at, said.replace(place, ""))
    return row(refusal.name, refusal.exercises, "", "**not refused**")


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
