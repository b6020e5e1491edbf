from __future__ import annotations

import pytest

from vllmc.core.cache.explain import diff
from vllmc.core.cache.key import REDACTED, Factor, key_of
from vllmc.core.cache.redaction import hide, redact, scrub


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "token",
        "accessToken",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "OPENAI_API_KEY",
        "apikey",
        "STRIPE_KEY",
        "SSH_PRIVATE_KEY",
        "PGPASSWORD",
        "db_password",
        "MYSQL_PWD",
        "client_secret",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GITHUB_PAT",
        "NPM_AUTH",
        "SESSION_COOKIE",
    ],
)
def test_text_under_the_name_of_a_secret_is_redacted(name):
    assert redact(name, "hunter2") == REDACTED
    assert redact(name, ["hunter2", 3]) == [REDACTED, 3]
    assert redact(name, {"value": "hunter2"}) == {"value": REDACTED}
    assert redact("config", {name: "hunter2"}) == {name: REDACTED}
    assert redact(name, "") == ""


@pytest.mark.parametrize(
    "name",
    [
        "key_cache",
        "tokenizer",
        "tokenizer_class",
        "num_key_value_heads",
        "max_num_batched_tokens",
        "VLLM_MAX_NUM_BATCHED_TOKENS",
        "eos_token",
        "pad_token",
        "use_cls_token",
        "eos_token_id",
        "token_type_ids",
        "sort_key",
        "TORCH_CACHE_KEY",
        "PATH",
        "author",
        "pattern_matcher",
        "monkey",
        "compat",
        "keyboard",
    ],
)
def test_text_under_an_innocent_name_is_kept(name):
    assert redact(name, "value") == "value"


@pytest.mark.parametrize(
    "value",
    [
        "hf_" + "aB3" * 11,
        "sk-proj-" + "aB3" * 8,
        "ghp_" + "aB3" * 12,
        "github_pat_" + "aB3" * 12,
        "AKIAIOSFODNN7EXAMPLE",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-_123",
        "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc",
        "Authorization: Bearer opaque-0123456789",
        "sk_live_" + "aB3" * 8,
        "https://user:hunter2@proxy.example:3128/",
        "https://host/?api_key=hunter2&x=1",
        "connect with password = 'hunter2'",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE",
    ],
)
def test_text_in_the_shape_of_a_secret_is_redacted_under_any_name(value):
    assert redact("NOTES", value) == REDACTED
    assert redact("NOTES", {"a": [f"--header={value}"]}) == {"a": [REDACTED]}


@pytest.mark.parametrize(
    "value",
    [
        "hf_transfer",
        "disk-cache-with-a-long-directory-name",
        "https://pypi.org:443/simple",
        "vllmc::unified_attention_with_output",
        "ATEN,CPP,TRITON",
        "meta-llama/Llama-3.1-8B-Instruct@main",
        "s3://bucket/models:v2/user@host",
        "a" * 64,
        3,
        2.5,
        True,
        None,
    ],
)
def test_other_values_are_kept(value):
    assert redact("NOTES", value) == value
    if not isinstance(value, str):
        assert redact("HF_TOKEN", value) == value


RANDOM = (
    "q7Xv2/LmP9sTz4Rb+Kd8WnHc3YfGj6Ue1AoQi5B0",
    "0f1e2d3c4b5a69788796a5b4c3d2e1f0",
    "dGhpcyBpcyBhIHZlcnkgbG9uZyBzZWNyZXQga2V5IDEyMw==",
)


@pytest.mark.parametrize("value", RANDOM)
def test_text_that_looks_random_is_redacted_where_that_is_asked_for(value):
    assert redact("NOTES", value) == value
    assert redact("NOTES", value, random=True) == REDACTED
    assert redact("NOTES", {"a": [f"x {value}"]}, random=True) == {"a": [REDACTED]}


@pytest.mark.parametrize(
    "value",
    [
        f"path:{'0f1e2d3c' * 8}",
        f"file:{'0f1e2d3c' * 4}",
        f"torch._inductor.passes.Mine#{'0f1e2d3c' * 8}",
        "decompose_mm_pass,remove_noop_ops,fuse_attention_pass",
        "checkpoints/Qwen3-Coder-480B-A35B-Instruct-FP8",
        "vllmc::unified_attention_with_output_and_kv_cache",
        "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS",
        "maxAutotuneGemmSearchSpaceExhaustiveMode",
        "x86-64-v4",
    ],
)
def test_digests_of_our_own_and_names_look_like_no_secret(value):
    assert redact("NOTES", value, random=True) == value


def test_only_the_secret_is_cut_from_a_sentence():
    token = "hf_" + "aB3" * 11
    assert scrub(f"'{token}' is no dtype") == f"'{REDACTED}' is no dtype"
    assert scrub("GET https://me:hunter2@host/x failed") == f"GET https://{REDACTED}@host/x failed"
    assert scrub("there is no model 'tiny-lama'") == "there is no model 'tiny-lama'"


def factor(value, origin="flag"):
    return Factor(group="inductor", name="some_text", value=value, origin=origin)


def test_a_hidden_value_counts_by_its_digest():
    plain = factor(["sk-" + "aB3" * 8, 1])
    hidden = hide(plain)
    assert hidden.value == [REDACTED, 1]
    assert hidden.digest == plain.digest
    assert key_of([hidden]) == key_of([plain])
    other = hide(factor(["sk-" + "aB4" * 8, 1]))
    assert (other.value, key_of([other]) == key_of([hidden])) == (hidden.value, False)
    assert Factor.from_json(hidden.to_json()) == hidden
    assert hide(factor("ATEN,CPP")) == factor("ATEN,CPP")


def test_random_text_is_secret_only_where_somebody_set_it():
    for origin in ("flag", "env:X", "file:vllmc.toml:3"):
        assert hide(factor(RANDOM[0], origin)).value == REDACTED
    for origin in ("default", "vllmc", "probe"):
        assert hide(factor(RANDOM[0], origin)).value == RANDOM[0]


def test_two_hidden_values_are_a_secret_change_that_nothing_restores():
    before, after = hide(factor(RANDOM[0])), hide(factor(RANDOM[1]))
    [change] = diff([before], [after])
    assert (change.before, change.after) == (REDACTED, REDACTED)
    assert (change.klass, change.affects_key, change.restore) == ("secret", True, "")
    assert diff([before], [before]) == ()
