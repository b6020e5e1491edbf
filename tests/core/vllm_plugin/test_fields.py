"""How the hashed fields of a config are named, and what is said of those that cannot be."""

from __future__ import annotations

import enum
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from vllmc.core.vllm_plugin.fields import config_fields, readable
from vllmc.core.vllm_plugin.observation import ConfigHash, Hashed


class Mode(enum.Enum):
    NONE = 0
    SOME = 1


@dataclass
class Inner:
    size: int = 3

    def compute_hash(self) -> str:
        return "inner"


@dataclass
class Part:
    mode: Mode = Mode.NONE
    inner: Inner = field(default_factory=Inner)
    table: dict[str, int] = field(default_factory=lambda: {"a": 1})

    def compute_hash(self) -> str:
        return "part"


@dataclass
class Config:
    part_config: Part = field(default_factory=Part)
    scheduler_config: Part = field(default_factory=Part)
    additional_config: dict[str, int] = field(default_factory=dict)


@dataclass
class Speculation:
    target_config: Part

    def compute_hash(self) -> str:
        return "speculation"


@dataclass
class Speculating:
    part_config: Part
    speculative_config: Speculation | None = None


def digest(content: Any) -> str:
    """As vLLM makes it: of fields SHA-256, of a text MD5."""
    if isinstance(content, bytes):
        return hashlib.md5(content).hexdigest()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hashed(owner: Any, content: Any) -> Hashed:
    return Hashed(owner=owner, content=content, digest=digest(content))


def of(config: Any, *parts: Hashed) -> ConfigHash:
    return ConfigHash(config=config, digest=parts[-1].digest[:10], parts=parts)


INNER = {"size": 3}
PART = {"mode": ("x.Mode", 0), "table": (("a", 1),), "inner": digest(INNER)}
LISTED = b"[2048, 128]"
OWN = b'{"own": 1}'
DIGESTS = (digest(PART), digest(LISTED), digest(OWN))


def whole(config: Config, *summary: Any) -> ConfigHash:
    part = config.part_config
    return of(
        config,
        hashed(part.inner, INNER),
        hashed(part, PART),
        hashed(config.scheduler_config, LISTED),
        hashed(config, OWN),
        hashed(config, str([["0.33.0", *summary]]).encode()),
    )


def test_fields_are_named_by_the_objects_that_have_them() -> None:
    found = config_fields(whole(Config(), *DIGESTS, "None"))
    assert found.values == {
        "part_config.inner.size": 3,
        "part_config.mode": "Mode.NONE",
        "part_config.table": {"a": 1},
        "scheduler_config.max_num_batched_tokens": 2048,
        "scheduler_config.max_num_seqs": 128,
        "additional_config": {"own": 1},
    }
    assert (found.version, found.whole, found.unread) == ("0.33.0", True, ())


def test_a_config_that_hashes_nothing_is_no_gap() -> None:
    nothing = hashlib.md5(b"[]").hexdigest()
    assert config_fields(whole(Config(), *DIGESTS, nothing)).whole


def test_a_hash_that_nothing_accounts_for_is_said() -> None:
    found = config_fields(whole(Config(), *DIGESTS, "feed"))
    assert not found.whole
    assert found.unread == ("what the config's hash has as feed",)


def test_a_release_that_hashes_more_in_a_list_names_places() -> None:
    config = Config()
    part = hashed(config.scheduler_config, b"[2048, 128, True]")
    summary = str([["0.99", part.digest]]).encode()
    found = config_fields(of(config, part, hashed(config, summary)))
    assert found.whole
    assert found.values == {
        "scheduler_config.0": 2048,
        "scheduler_config.1": 128,
        "scheduler_config.2": True,
    }


def test_an_object_that_another_part_refers_to_keeps_its_own_name() -> None:
    config = Speculating(part_config=Part())
    config.speculative_config = Speculation(target_config=config.part_config)
    part = hashed(config.part_config, {"mode": ("x.Mode", 1)})
    summary = str([["0.33.0", part.digest]]).encode()
    found = config_fields(of(config, part, hashed(config, summary)))
    assert found.values == {"part_config.mode": "Mode.SOME"}


def test_a_dtype_in_a_list_hides_none_of_the_others() -> None:
    config = Config()
    part = hashed(config.scheduler_config, b"[2048, torch.bfloat16]")
    summary = str([["0.33.0", part.digest]]).encode()
    found = config_fields(of(config, part, hashed(config, summary)))
    assert found.values == {
        "scheduler_config.max_num_batched_tokens": 2048,
        "scheduler_config.max_num_seqs": "torch.bfloat16",
    }


def test_an_object_outside_of_the_config_is_said() -> None:
    found = config_fields(of(Config(), hashed(Inner(), {"size": 4})))
    assert found.values == {"Inner.size": 4}
    assert not found.whole


def test_a_value_is_shown_as_it_was_when_it_was_hashed() -> None:
    assert readable(("x.Mode", 0), Mode.SOME) == "Mode.NONE"
    assert readable(("x.Mode", 7), Mode.SOME) == ["x.Mode", 7]


def test_a_model_s_config_is_told_apart_field_by_field() -> None:
    assert readable(json.dumps({"hidden_size": 64})) == {"hidden_size": 64}
    assert readable("{no json") == "{no json"


def test_what_is_hashed_alike_is_shown_alike() -> None:
    normal = ("some.Inner", (("size", 3),))
    assert readable(normal, Inner()) == {"class": "some.Inner", "size": 3}
    assert readable(((1, 2), "x"), [[1, 2], "x"]) == [[1, 2], "x"]
    assert readable(("'a'", "'b'"), {"a", "b"}) == ["'a'", "'b'"]


def test_a_hash_that_is_made_in_another_way_is_said() -> None:
    config = Config()
    salted = Hashed(owner=config.part_config, content={"other": 1}, digest="0" * 64)
    summary = str([["0.99", salted.digest]]).encode()
    found = config_fields(of(config, salted, hashed(config, summary)))
    assert found.values == {"part_config.other": 1}
    assert found.unread == (
        "part_config: its hash is not made of its fields in the way that is known",
    )
    cut = ConfigHash(config=config, digest="0123456789", parts=(hashed(config, b"[['0.33.0']]"),))
    assert not config_fields(cut).whole
