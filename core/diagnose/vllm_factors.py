"""The factors of vLLM's compile cache key: what is recorded, what is hashed, what is spurious.

The key is ten hex digits of the SHA-256 over four hashes: of the environment's factors, of the
config, of the traced source files, of the compiler. vLLM records the first in full and of the
others the hash alone. Facts: vllm/envs.py (`compile_factors`) and vllm/compilation/backends.py of
vLLM 0.11, 0.12, 0.15, 0.20, 0.24 and 0.28 to 0.33. vLLM before 0.12 records nothing.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from vllmc.core.cache.key import Factor, JsonValue, canonical_json, sha256_hex
from vllmc.core.cache.redaction import redact
from vllmc.core.diagnose.foreign_files import clean_json

ENVIRONMENT: Final = "vllm.env"
HASHES: Final[Mapping[str, str]] = {
    "config": "vllm.config",
    "code": "vllm.code",
    "compiler": "vllm.compiler",
}

_SAME: Final = "set it to one value everywhere"
_NAME: Final = "use a name that is the same everywhere and that each host resolves to itself"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spurious:
    """Why a variable that vLLM hashes shapes no code, and how to keep it from changing the key.

    `default` is the value that is the same everywhere; `left_out_since` the first release looked
    at whose key is without the variable, empty where there is none.
    """

    reason: str
    remedy: str = _SAME
    default: JsonValue = None
    left_out_since: str = ""

    @property
    def advice(self) -> str:
        """The remedy, and the release that needs none."""
        if not self.left_out_since:
            return self.remedy
        return f"{self.remedy}, or use vLLM {self.left_out_since} or later, whose key is without it"


_HOST: Final = "an address that peers connect to"
_PORT: Final = "a port that peers connect to"
_LABEL: Final = "a label of the image or build"
SPURIOUS: Final[Mapping[str, Spurious]] = {
    "VLLM_NIXL_SIDE_CHANNEL_HOST": Spurious(
        reason=_HOST, remedy=_NAME, default="localhost", left_out_since="0.24"
    ),
    "VLLM_EC_SIDE_CHANNEL_HOST": Spurious(reason=_HOST, remedy=_NAME, default="localhost"),
    "VLLM_P2P_SIDE_CHANNEL_HOST": Spurious(reason=_HOST, remedy=_NAME, default="localhost"),
    "MOONCAKE_REQUESTER_LOCAL_HOSTNAME": Spurious(reason=_HOST, remedy=_NAME),
    "MOONCAKE_PREFERRED_SEGMENT": Spurious(reason="the host and port of a store's segment"),
    "VLLM_LOOPBACK_IP": Spurious(reason="the address of the loopback device", default=""),
    "VLLM_RAY_DP_PLACEMENT_NODE_IPS": Spurious(reason="the nodes that Ray may use", default=""),
    "VLLM_NIXL_SIDE_CHANNEL_PORT": Spurious(reason=_PORT, default=5600),
    "VLLM_EC_SIDE_CHANNEL_PORT": Spurious(reason=_PORT, default=5601),
    "VLLM_P2P_SIDE_CHANNEL_PORT": Spurious(reason=_PORT, default=5710),
    "VLLM_MOONCAKE_BOOTSTRAP_PORT": Spurious(reason=_PORT, default=8998),
    "VLLM_DP_RANK": Spurious(
        reason="the index of an engine among its data-parallel peers", default=0
    ),
    "VLLM_DP_RANK_LOCAL": Spurious(
        reason="the index of an engine among those of its node", default=0
    ),
    "VLLM_RAY_BUNDLE_INDICES": Spurious(
        reason="where Ray placed this engine's workers", default="", left_out_since="0.33"
    ),
    "VLLM_PROCESS_NAME_PREFIX": Spurious(reason="how processes are called", default="VLLM"),
    "VLLM_XLA_CACHE_PATH": Spurious(
        reason="a cache directory below HOME, which only TPUs use",
        remedy="set it to one path everywhere",
        left_out_since="0.28",
    ),
    "VLLM_CONFIG_ROOT": Spurious(
        reason="a directory of settings below HOME",
        remedy="set it to one path everywhere",
        left_out_since="0.28",
    ),
    "VLLM_LORA_RESOLVER_CACHE_DIR": Spurious(reason="where LoRA adapters are kept"),
    "VLLM_TORCH_PROFILER_DIR": Spurious(reason="where profiles are written", left_out_since="0.20"),
    "VLLM_RUST_FRONTEND_PATH": Spurious(reason="where the HTTP front end is installed"),
    "VLLM_CUDART_SO_PATH": Spurious(reason="where the CUDA runtime library is"),
    "VLLM_NCCL_SO_PATH": Spurious(reason="where the NCCL library is"),
    "VLLM_API_KEY": Spurious(
        reason="the server's password", remedy="give it as --api-key", left_out_since="0.29"
    ),
    "VLLM_SYSTEM_START_DATE": Spurious(reason="a date that goes into prompts"),
    "VLLM_USAGE_SOURCE": Spurious(reason="a label of usage statistics", default="production"),
    "VLLM_IMAGE_TAG": Spurious(reason=_LABEL, default=""),
    "VLLM_BUILD_COMMIT": Spurious(reason=_LABEL, default="unknown"),
    "VLLM_BUILD_PIPELINE": Spurious(reason=_LABEL, default="local"),
    "VLLM_BUILD_URL": Spurious(reason=_LABEL, default=""),
}
_ADDRESS: Final = re.compile(r"_(?:HOST|HOSTNAME|IPS?|PORT)$")

# Variables that one of the releases looked at has in its key and the one before, or after, has not.
_NEWER_THAN: Final = (
    ("VLLM_COHERE2_ATTN_MOE_DUAL_STREAM_TOKEN_THRESHOLD", "0.32"),
    ("VLLM_P2P_MAX_PEERS", "0.31"),
    ("VLLM_ENABLE_HPC_OPS", "0.28"),
    ("VLLM_P2P_SIDE_CHANNEL_HOST", "0.24"),
    ("VLLM_RAY_DP_PLACEMENT_NODE_IPS", "0.20"),
    ("VLLM_USE_LAYERNAME", "0.15"),
    ("VLLM_USE_MEGA_AOT_ARTIFACT", "0.12"),
)
_OLDER_THAN: Final = (
    ("VLLM_ATTENTION_BACKEND", "0.15"),
    ("VLLM_TORCH_PROFILER_DIR", "0.20"),
    ("VLLM_NIXL_SIDE_CHANNEL_HOST", "0.24"),
    ("VLLM_XLA_CACHE_PATH", "0.28"),
    ("VLLM_API_KEY", "0.29"),
    ("VLLM_RAY_BUNDLE_INDICES", "0.33"),
)
_COMPLETE: Final = 100


RELEASE: Final = ("vllm.versions", "vllm")
"""The group and name of the factor that is vLLM's own version."""
VARIABLES: Final = "vllm.variables"
"""The group of the variables that torch's configs read; vLLM hashes what they make of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFacts:
    """What is known of one cache key.

    `factors` hold no secret; `hidden` are the digests of the values left out, by name, so that two
    sides can be told to differ. `env_hash` is vLLM's own over all of the environment's factors;
    `complete` says that all of them are here. `fields` are what the hashes among the factors are
    made of, and provenance, where vllmc's plugin recorded them (`vllm_recorded`).
    """

    factors: tuple[Factor, ...] = ()
    fields: tuple[Factor, ...] = ()
    hidden: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    env_hash: str = ""
    complete: bool = False

    @property
    def environment(self) -> Mapping[str, JsonValue]:
        """The environment's factors by name."""
        return {f.name: f.value for f in self.factors if f.group == ENVIRONMENT}

    @property
    def release(self) -> str:
        """The release of vLLM, if vllmc's plugin recorded it, else which hash these variables.

        Empty where neither can be told.
        """
        recorded = next((f.value for f in self.fields if f.identity == RELEASE), None)
        return str(recorded) if recorded else release(self.environment)

    @property
    def secrets(self) -> tuple[str, ...]:
        """The names of the factors whose values are left out."""
        return tuple(name for name, _ in self.hidden)


def key_facts(
    environment: Mapping[str, object], hashes: Mapping[str, str], env_hash: str = ""
) -> KeyFacts:
    """The facts of a key with these factors, as they were parsed.

    `hashes` are by the names `config`, `code` and `compiler`; `env_hash` is the recorded one where
    there is one.
    """
    factors, hidden = [], []
    for name, raw in sorted(environment.items()):
        value = clean_json(raw)
        shown = redact(name, value)
        if shown != value:
            hidden.append((name, sha256_hex(canonical_json(value))))
        factors.append(
            Factor(
                group=ENVIRONMENT, name=name, value=shown, origin=f"env:{name}", is_default=False
            )
        )
    for name, digest in hashes.items():
        factors.append(
            Factor(group=HASHES[name], name="hash", value=digest, origin="probe", is_default=False)
        )
    computed = _environment_hash(environment) if environment else ""
    return KeyFacts(
        factors=tuple(factors),
        hidden=tuple(hidden),
        env_hash=env_hash or computed,
        complete=bool(computed) and env_hash in ("", computed),
    )


def derived_key(facts: KeyFacts) -> str:
    """The key that vLLM (0.12 or newer) makes of these facts; empty where one is missing."""
    values = {f.group: f.value for f in facts.factors if f.group in HASHES.values()}
    if not facts.env_hash or len(values) < len(HASHES):
        return ""
    parts = [facts.env_hash, *(values[HASHES[name]] for name in HASHES)]
    return hashlib.sha256(str(parts).encode()).hexdigest()[:10]


def spurious(name: str) -> Spurious | None:
    """Why the variable `name` shapes no code; None where vllmc knows no reason."""
    known = SPURIOUS.get(name)
    if known is None and _ADDRESS.search(name):
        return Spurious(reason="by its name an address or a port")
    return known


def moving(facts: KeyFacts) -> tuple[str, ...]:
    """The spurious factors that have a value which may be another one elsewhere."""
    return tuple(
        name
        for name, value in facts.environment.items()
        if (known := spurious(name)) is not None and value not in (None, "", known.default)
    )


def release(names: Collection[str]) -> str:
    """Which releases have these variables in their keys: `after 0.24, before 0.33`, or empty."""
    if len(names) < _COMPLETE:
        return ""
    newer = next((f"after {r}" for name, r in _NEWER_THAN if name in names), "0.12 or later")
    older = next((f"before {r}" for name, r in _OLDER_THAN if name in names), "")
    return f"{newer}, {older}" if older else newer


def follows_handles(names: Collection[str]) -> bool:
    """Whether the release with these variables may look for artifacts where its index says, as
    those before 0.32 do; later ones look beside the index.
    """
    return "VLLM_P2P_MAX_PEERS" not in names


def _environment_hash(environment: Mapping[str, object]) -> str:
    try:
        return sha256_hex(json.dumps(environment, sort_keys=True))
    except (TypeError, ValueError, RecursionError):
        return ""
