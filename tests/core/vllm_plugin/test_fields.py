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


def hashed(owner: Any, content: Any, digest: str) -> Hashed:
    return Hashed(owner=owner, content=content, digest=digest)


def of(config: Any, *parts: Hashed) -> ConfigHash:
    return ConfigHash(config=config, digest="0123456789", parts=parts)


def whole(config: Config, *summary: Any) -> ConfigHash:
    part = config.part_config
    content = {"mode": ("x.Mode", 0), "table": (("a", 1),), "inner": "h1"}
    return of(
        config,
        hashed(part.inner, {"size": 3}, "h1"),
        hashed(part, content, "h2"),
        hashed(config.scheduler_config, b"[2048, 128]", "h3"),
        hashed(config, b'{"own": 1}', "h4"),
        hashed(config, str([["0.33.0", *summary]]).encode(), "0123456789"),
    )


def test_fields_are_named_by_the_objects_that_have_them() -> None:
    found = config_fields(whole(Config(), "h2", "h3", "None", "h4"))
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
    assert config_fields(whole(Config(), "h2", nothing, "h3", "h4")).whole


def test_a_hash_that_nothing_accounts_for_is_said() -> None:
    found = config_fields(whole(Config(), "h2", "h3", "h4", "feed"))
    assert not found.whole
    assert found.unread == ("what the config's hash has as feed",)


def test_a_release_that_hashes_more_in_a_list_names_places() -> None:
    config = Config()
    part = hashed(config.scheduler_config, b"[2048, 128, True]", "h3")
    found = config_fields(of(config, part, hashed(config, b"[['0.99', 'h3']]", "x")))
    assert found.values == {
        "scheduler_config.0": 2048,
        "scheduler_config.1": 128,
        "scheduler_config.2": True,
    }


def test_an_object_outside_of_the_config_is_said() -> None:
    found = config_fields(of(Config(), hashed(Inner(), {"size": 4}, "h")))
    assert found.values == {"Inner.size": 4}
    assert not found.whole


def test_a_model_s_config_is_told_apart_field_by_field() -> None:
    assert readable(json.dumps({"hidden_size": 64})) == {"hidden_size": 64}
    assert readable("{no json") == "{no json"


def test_what_is_hashed_alike_is_shown_alike() -> None:
    normal = ("some.Inner", (("size", 3),))
    assert readable(normal, Inner()) == {"class": "some.Inner", "size": 3}
    assert readable(((1, 2), "x"), [[1, 2], "x"]) == [[1, 2], "x"]
    assert readable(("'a'", "'b'"), {"a", "b"}) == ["'a'", "'b'"]
