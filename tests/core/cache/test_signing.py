"""Signatures: what is signed, by whom, and how keys are spelled."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmc.core.cache.record import decode, encode
from vllmc.core.cache.signing import (
    Signature,
    generate,
    load_signing_key,
    public_text,
    read_public_key,
    split,
)
from vllmc.core.errors import VllmcError

KEY = generate()


@given(st.binary(max_size=300))
def test_what_is_signed_comes_back_with_a_signature_that_holds(data):
    body, signature = split(KEY.signed(data))
    assert body == data
    assert signature is not None
    assert signature.key == KEY.public
    assert signature.is_of(data)
    assert not signature.is_of(data + b"!")


def test_signing_the_same_twice_gives_the_same_bytes():
    assert KEY.signed(b"record") == KEY.signed(b"record")


def test_another_key_did_not_sign_it():
    _, signature = split(KEY.signed(b"record"))
    assert signature is not None
    assert not Signature(generate().public, signature.value).is_of(b"record")


@given(st.data())
def test_no_flipped_bit_leaves_a_signature_that_holds(data):
    signed = bytearray(KEY.signed(b"some record\n"))
    place = data.draw(st.integers(0, len(signed) * 8 - 1))
    signed[place // 8] ^= 1 << place % 8
    body, signature = split(bytes(signed))
    assert signature is None or not signature.is_of(body)


def test_a_signed_record_reads_as_the_record(make_unit):
    record = make_unit(b"artifact")
    assert decode(KEY.signed(encode(record))) == record


def test_what_stands_before_a_signature_is_all_that_it_signs(make_unit):
    twice = KEY.signed(KEY.signed(encode(make_unit(b"artifact"))))
    body, _ = split(twice)
    assert split(body)[1] is not None
    with pytest.raises(ValueError):
        decode(twice)


def test_keys_of_openssh_and_openssl_are_read(tmp_path):
    ssh = tmp_path / "ssh"
    ssh.write_text(KEY.private_text())
    assert load_signing_key(ssh).public == KEY.public
    assert read_public_key(public_text(KEY.public, "me"), "me.pub") == KEY.public

    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    pem = tmp_path / "pem"
    pem.write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    public = key.public_key()
    text = public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    assert load_signing_key(pem).public == read_public_key(text.decode(), "pem")


@pytest.mark.parametrize(
    "text", ["", "no key", "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", "ssh-ed25519 AAAA x"]
)
def test_what_is_no_key_is_an_error_that_names_the_file(text, tmp_path):
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(VllmcError, match=str(path)) as caught:
        load_signing_key(path)
    assert caught.value.code == "bad-signing-key"
    assert "keygen" in caught.value.hint
    with pytest.raises(VllmcError, match=r"me\.pub") as caught:
        read_public_key(text, "me.pub")
    assert caught.value.code == "bad-public-key"


def test_a_key_of_another_kind_is_an_error(tmp_path):
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    key = generate_private_key(SECP256R1())
    path = tmp_path / "key"
    path.write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    with pytest.raises(VllmcError, match="no Ed25519 key"):
        load_signing_key(path)


def test_a_missing_key_or_a_directory_is_an_error(tmp_path):
    with pytest.raises(VllmcError, match="there is no such file"):
        load_signing_key(tmp_path / "none")
    with pytest.raises(VllmcError, match="Is a directory") as caught:
        load_signing_key(tmp_path)
    assert caught.value.code == "bad-signing-key"


def test_a_key_is_read_through_a_link_as_a_secret_is_mounted(tmp_path):
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "key").write_text(KEY.private_text())
    (tmp_path / "key").symlink_to("..data/key")
    assert load_signing_key(tmp_path / "key").public == KEY.public


def test_a_key_that_ssh_keygen_made_signs(tmp_path):
    path = tmp_path / "id"
    try:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    except FileNotFoundError:
        pytest.skip("there is no ssh-keygen")
    public = Path(f"{path}.pub").read_text()
    assert load_signing_key(path).public == read_public_key(public, "id.pub")
