"""Writes docs/cache-key.md from the code's tables; `--check` only says if it is up to date."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from pages import publish

from vllmc.core.cache.factor_table import (
    CUDA_ENVIRONMENT,
    ENVIRONMENT,
    FACTORS,
    GPU_FACTORS,
    GROUPS,
    NO_FACTORS,
    ORIGINS,
)
from vllmc.core.cache.factors import UNIT_FACTORS, UNIT_GROUPS
from vllmc.core.cache.record import GRAPH_GROUPS
from vllmc.core.cache.redaction import SECRET_LAST_WORDS, SECRET_PARTS, SHAPES, VOCABULARY
from vllmc.core.models.transformers_model import NOT_IDENTITY
from vllmc.core.torch_compat.config import VLLMC_SETS
from vllmc.core.torch_compat.config_scope import CAPTURE, EXCLUDED
from vllmc.core.torch_compat.minors import MINORS
from vllmc.core.torch_compat.version import spelled

PAGE = Path(__file__).parent.parent / "docs" / "cache-key.md"
PROVENANCE = "provenance"

HEAD = """# The cache key

<!-- Written by scripts/gen_cache_key_doc.py: change the tables in core/, then run it. -->

A key is the SHA-256 of named factors. Each factor has a group, a name, a JSON value and the
SHA-256 of that value; the key is taken over (group, name, digest) of every factor that affects it,
sorted. Records keep the factors in full, so that a miss can name the one that moved:
`vllmc inspect-key -v` prints them all, `vllmc diff-config` compares two sets.

## Two keys

The **program key** is known before the model is captured. It answers "is everything there?": its
record says which artifacts to load and how to link them, so a hit captures and compiles nothing.

The **unit key** is known after capture. It answers "is the code for this piece there?", where a
unit is one unique piece for one range of token counts. It leaves out the model: two models with
equal layers share artifacts, and so do two numbers of layers of one model.

| group | holds | in the program key | in the unit key |
|---|---|---|---|
"""

BESIDE = """
## What is checked beside the key

A program's record is used only if what its capture saw is still so. Neither is part of the key,
since neither is known before a capture; both are part of the record's id, so that records of two
versions of the sources lie side by side under one key.

- **Source files.** The files whose functions Dynamo traced, and those that implement the custom
  ops it met, each named relative to its package
  (`transformers/models/llama/modeling_llama.py`), with the digest of its contents and the
  functions traced in it. They are compared with the files of the packages installed now. torch's
  own files and vllmc's are covered by `versions.torch_key` and the group `code`. A change is
  reported as `sources.PACKAGE/PATH`, with the functions.
- **Guarded values.** For a model given as `module:attribute`: the attributes, globals, closures
  and defaults that Dynamo guarded on, by what reads them (`pkg.mod.SCALE`, `self.mlp.act`). A
  linked program has no guards, so they are read again instead. Two values that a program can tell
  apart are told apart: a function by its bytecode, defaults and closure, a table by its order too.
  A long value is kept as a digest. A value that cannot be read without running code makes the
  prediction `unknown`, and the program is captured again; its units may still hit by their keys.

## Where a value came from

Every factor has an origin. It is shown and recorded, and no part of the key: the same value from
another place is the same key.

| origin | meaning |
|---|---|
"""

CONFIGS = """
## inductor and functorch

Both configs of torch are factors whole, private options included: an option that a later torch
adds is covered without anyone listing it. They are read under the overrides that compilation runs
under, which one function applies for both (`core/torch_compat/config.py`). Values that are no JSON
have stable texts: a function counts by its name and source, a custom pass by its `uuid()`, an
absolute path by its digest.

vllmc sets these, unless you do with `-O`:

| option | value | why |
|---|---|---|
"""

MARCH = (
    "on x86-64 under Linux",
    "Inductor compiles with `-march=native`, so that the code would be this very CPU model's. A "
    "level of the x86-64 ABI (`x86-64-v3`, `x86-64-v4`) makes code for every CPU that has it",
)

EXCLUSIONS = """
### Options that are no factors

Changing any other option changes the key; a test tries each one.

| options | why |
|---|---|
"""

DYNAMO = """
## dynamo

Most of Dynamo's settings concern guards, logs and recompiling. These count; those of
`torch.compiler.config` have the prefix `compiler.`, those of `torch.fx.experimental._config`
`symbolic_shapes.`.

| settings | why |
|---|---|
"""

VERSIONS = """
## What differs by torch version

Of the options and settings named above, these do not exist in some versions that vllmc runs with:

| torch | has no |
|---|---|
"""

MODEL = """
## model

- **A preset, a directory or a hub id**: each field of the configuration, nested ones with dots,
  but for names, token ids and what only `generate` reads. Neither the directory, the id nor the
  revision counts: equal configurations are one model.
- **`module:attribute`**: the module is made with fake weights. Each module in it is a factor under
  its path (`.` is the outermost): its class, its modules, the dtypes, shapes and strides of its
  tensors and which of them it shares, its plain attributes (a path by its digest), its hooks.
  `class NAME` is a digest of the bytecode of the class and its bases, so that a method which a
  package of kernels replaces counts; of torch's own classes that is `forward` and `__call__`.
"""

SECRETS = """
## Secrets

A secret is replaced by `<redacted>` in factors, records, snapshots and reports. It is known by the
name that it stands under, or by its shape.

{names}
{shapes}
- In options and variables that somebody set also long text that looks drawn at random, in hex or
  base64.

What becomes of the key:

- **Options and variables** are read by compilers, so a hidden value still counts, by its digest:
  another one is another key, and the difference is of class `secret`. Only shapes are found there,
  and what has one is long and random, so that a digest does not give it away; but for a weak
  password in a URL or an assignment.
- **Fields of a configuration, attributes of a module** do not count where they are secret: a token
  that is rotated keeps the key. Names are found there too, and the digest of a short password could
  be guessed.
- **Guarded values**: of a secret that a graph depends on nothing is stored, not even a digest. The
  program is captured anew in each process, and the prediction is `unknown`.

Error messages and tracebacks are searched for shapes. A secret that has neither a telling name nor
a telling shape is not found.
"""


def page() -> str:
    """The whole page."""
    return "".join(
        [
            HEAD,
            rows((f"`{g}`", holds, *scope(g)) for g, holds in GROUPS.items()),
            *(section(group) for group in ("spec", "versions", "system", "code")),
            section("environment", variables()),
            CONFIGS,
            rows([*own_settings(), ("`inductor.cpp.march`", *MARCH)]),
            EXCLUSIONS,
            rows(by_reason({f"{g}.{n}": why for (g, n), why in EXCLUDED.items()})),
            DYNAMO,
            rows(by_reason(CAPTURE)),
            VERSIONS,
            rows(
                (spelled(minor), code(f"{g}.{n}" for g, n in sorted(has.absent)))
                for minor, has in MINORS.items()
                if has.absent
            ),
            MODEL,
            item(f"Fields of a configuration that do not count: {code(sorted(NOT_IDENTITY))}."),
            "\n",
            BESIDE,
            rows((f"`{origin}`", meaning) for origin, meaning in ORIGINS.items()),
            "\n## What else is no factor\n\n| what | why |\n|---|---|\n",
            rows((f"`{name}`", why) for name, why in NO_FACTORS.items()),
            SECRETS.format(
                names=item(
                    f"Names: those that contain {code(SECRET_PARTS)}; those whose last word is "
                    f"{code(SECRET_LAST_WORDS)}, unless a word before it says that it is "
                    f"vocabulary ({code(VOCABULARY)}); and those in capitals that end in `KEY`."
                ),
                shapes=item(f"Shapes: {', '.join(SHAPES)}."),
            ),
        ]
    )


def scope(group: str) -> tuple[str, str]:
    """Whether a group is part of the program key, and of the unit key."""
    if group in GRAPH_GROUPS:
        return "no", "yes"
    some = [name for g, name in sorted(UNIT_FACTORS) if g == group]
    return "yes", "yes" if group in UNIT_GROUPS else code(some) or "no"


def section(group: str, more: Iterable[Sequence[str]] = ()) -> str:
    """The table of a group's factors."""
    found = [(name, what) for (g, name), what in FACTORS.items() if g == group]
    found += [(name, f"GPU: {what}") for (g, name), what in GPU_FACTORS.items() if g == group]
    lines = [(f"`{name}`", what, key_of(group, name, what)) for name, what in found]
    head = f"\n## {group}\n\n| factor | what it is | in |\n|---|---|---|\n"
    return head + rows([*lines, *more])


def key_of(group: str, name: str, what: str) -> str:
    """The keys that a factor is part of."""
    if what.startswith(PROVENANCE):
        return "no key"
    shared = group in UNIT_GROUPS or (group, name) in UNIT_FACTORS
    return "both keys" if shared else "program key"


def variables() -> Iterator[Sequence[str]]:
    """The rows of the environment variables."""
    for name, why in sorted(ENVIRONMENT.items()):
        yield f"`{name}`", why, "both keys"
    for name, why in sorted(CUDA_ENVIRONMENT.items()):
        yield f"`{name}`", f"GPU: {why}", "both keys"


def own_settings() -> Iterator[Sequence[str]]:
    """The rows of the options that vllmc sets."""
    for (group, name), (value, why) in VLLMC_SETS.items():
        # As -O takes it.
        text = str(value).lower() if isinstance(value, bool) else str(value)
        yield f"`{group}.{name}`", f"`{text}`", why


def by_reason(reasons: Mapping[str, str]) -> Iterator[Sequence[str]]:
    """One row for each reason, with the names that have it."""
    order = list(dict.fromkeys(reasons.values()))
    ranked = sorted(reasons, key=lambda name: order.index(reasons[name]))
    for why, names in groupby(ranked, key=reasons.__getitem__):
        yield code(names), why


def code(names: Iterable[str]) -> str:
    """Names in code font, separated by commas."""
    return ", ".join(f"`{name}`" for name in names)


def rows(lines: Iterable[Sequence[str]]) -> str:
    """Rows of a Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def item(text: str) -> str:
    """An item of a list, wrapped."""
    return textwrap.fill(f"- {text}", width=100, subsequent_indent="  ", break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(publish(PAGE, page(), "scripts/gen_cache_key_doc.py"))
