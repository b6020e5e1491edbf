"""From options to a job: the one place where a command line meets torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vllmc.cli.options import CompileRequest
from vllmc.cli.settings import Settings
from vllmc.core.passes import PASSES, chosen
from vllmc.core.torch_compat.version import installed_torch, refuse_older

if TYPE_CHECKING:
    from vllmc.core.job import Job
    from vllmc.core.models.model import Model

_FIELDS = {
    "device": "device",
    "dtype": "dtype",
    "compile-range": "ranges",
    "compile-size": "sizes",
    "dynamic-shapes": "dynamic_shapes",
    "layer-names": "layer_names",
    "experts": "experts",
    "splitting-op": "splitting_ops",
    "split-kv-update": "split_kv_update",
    "quantize": "quantize",
    "backend": "backend",
}


def find_model(settings: Settings, request: CompileRequest) -> Model:
    """The model that is asked for. Raises what `resolve` raises."""
    # First of all, because what an older torch lacks shows wherever it is imported.
    refuse_older(installed_torch())

    from vllmc.core.models.resolve import resolve

    # `module:attribute` is looked for in the working directory too, which a console script does
    # not have on its path.
    if ":" in request.model and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return resolve(request.model, layers=request.layers, cache=settings.cache_dir)


def make(settings: Settings, request: CompileRequest) -> Job:
    """Resolves the model and the options. Raises `VllmcError` for what is not there."""
    since = time.time()
    model = find_model(settings, request)

    from vllmc.core.job import make_job, resolve_spec
    from vllmc.core.spec import CompileSpec, check_passes
    from vllmc.core.torch_compat.options import read_option

    options = {"inductor": dict[str, object](), "functorch": dict[str, object]()}
    for row in request.options:
        options[row.scope][row.name] = read_option(row.scope, row.name, row.text)
    spec = CompileSpec(
        device=request.device,
        dtype=request.dtype,
        ranges=request.ranges,
        sizes=request.sizes,
        dynamic_shapes=request.dynamic_shapes,
        layer_names=request.layer_names,
        experts=request.experts,
        splitting_ops=request.splitting_ops,
        split_kv_update=request.split_kv_update,
        quantize=request.quantize,
        inductor=tuple(sorted(options["inductor"].items())),  # type: ignore[arg-type]
        functorch=tuple(sorted(options["functorch"].items())),  # type: ignore[arg-type]
        backend=request.backend,
    )
    spec = resolve_spec(spec, model)
    # Which run by default is known with the device.
    passes = chosen(request.added_passes, request.removed_passes, spec.device)
    spec = replace(spec, passes=passes)
    check_passes(spec, [name for name in PASSES if _is_for_ranges(name, request.origins)])
    return make_job(
        model,
        spec,
        environment=settings.environment,
        cache_dir=settings.cache_dir,
        origins=_origins(request),
        since=since,
    )


def _is_for_ranges(name: str, origins: Mapping[str, str]) -> bool:
    """Whether the pass was asked for with these compile ranges in view.

    What a file or the environment says of a pass also holds for other ranges than its own.
    """
    said = _place(origins.get(f"pass {name}", "default"))
    ranges = {_place(origins[option]) for option in ("compile-range", "compile-size")}
    return said == "flag" or ranges <= {"default", said}


def _place(origin: str) -> str:
    """`file:vllmc.toml` of `file:vllmc.toml:3`; other origins as they are."""
    return origin.rpartition(":")[0] if origin.startswith("file:") else origin


def _origins(request: CompileRequest) -> Mapping[tuple[str, str], str]:
    origins = {("spec", field): request.origins[name] for name, field in _FIELDS.items()}
    origins["model", "layers"] = request.origins["layers"]
    origins |= {
        ("passes", name): request.origins[f"pass {name}"]
        for name in PASSES
        if f"pass {name}" in request.origins
    }
    return origins | {(row.scope, row.name): row.origin for row in request.options}
