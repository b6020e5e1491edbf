"""Compiles one model under one configuration after another, each capture and unit only once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from vllmc.core.cache.store import Store
from vllmc.core.errors import VllmcError
from vllmc.core.events import Observer
from vllmc.core.graph.plan import Plan, make_plan
from vllmc.core.job import Job, make_job, resolve_spec
from vllmc.core.models.model import Model
from vllmc.core.obtain import Policy, Reader
from vllmc.core.pipeline import capture_model, obtain_units
from vllmc.core.proof.compare import Built, BuiltUnit
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.config import applied, vllmc_overrides

# What capture depends on of Inductor's options: `capture` asks for the first, torch's symbolic
# shapes for the second. Of functorch's it may depend on any, as fake tensors are theirs.
_ASKED_BY_CAPTURE: Final = frozenset({"freezing", "unbacked_symint_fallback"})


class Workbench:
    """Makes jobs for `model` and compiles them; what is in the store already is taken from there.

    `environment` is what the process was started with.
    """

    def __init__(
        self, model: Model, *, environment: Mapping[str, str], store: Store, observer: Observer
    ) -> None:
        self._model = model
        self._environment = environment
        self._reader = Reader(store, observer)
        self._observer = observer
        self._plans: dict[str, Plan] = {}
        self._built: dict[str, Built | VllmcError] = {}

    def plain_job(self) -> Job:
        """A job with nothing set. Raises what `resolve_spec` raises."""
        return self.job(resolve_spec(CompileSpec(device="auto", dtype="auto"), self._model))

    def job(self, spec: CompileSpec) -> Job:
        """A job for `spec`. Raises what `make_job` raises."""
        return make_job(
            self._model,
            spec,
            environment=self._environment,
            cache_dir=self._reader.store.root,
            origins={},
        )

    def build(self, job: Job, label: str) -> Built:
        """Compiles what the store lacks of `job`; `label` is for the observer.

        Raises what capture and compilers raise, every time that it is asked for.
        """
        if job.key not in self._built:
            self._observer.stage(label)
            try:
                self._built[job.key] = self._build(job)
            except VllmcError as error:
                self._built[job.key] = error
        built = self._built[job.key]
        if isinstance(built, VllmcError):
            raise built
        return built

    def _build(self, job: Job) -> Built:
        with applied(vllmc_overrides(job.spec)):
            plan = self._plan(job)
            obtained = obtain_units(plan, job, self._reader, self._observer, Policy())
        units = {}
        for result in obtained.units:
            found = self._reader.unit(result.key)
            if found is None:
                raise VllmcError(
                    "cache-changed",
                    "the cache lost a unit while it was used",
                    hint="run it again, and no vllmc cache prune beside it",
                )
            units[result.pieces[0], result.range] = BuiltUnit(
                label=f"{result.pieces[0]} for {result.range} tokens",
                code=found[0].code,
                data=result.data,
            )
        return Built(spec=job.spec, plan=plan, units=units)

    def _plan(self, job: Job) -> Plan:
        asked = tuple((k, v) for k, v in job.spec.inductor if k in _ASKED_BY_CAPTURE)
        key = repr(replace(job.spec, inductor=asked, backend=""))
        if key not in self._plans:
            self._observer.stage("capture")
            self._plans[key] = make_plan(capture_model(job), job.spec)
        return self._plans[key]
