"""Signatures of records: Ed25519 (RFC 8032), by the `cryptography` package. Imports no torch.

A signed file has one more line at its end, which signs all that stands before it:

    vllmc-signature <the public key, 64 hex digits> <the signature, 128 hex digits>

The key is in the line so that damage shows without knowing whom to trust; whether the key is
trusted is another question (`trust`). A signature depends on nothing but the key and the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vllmc.core.errors import VllmcError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_LINE: Final = re.compile(rb"vllmc-signature ([0-9a-f]{64}) ([0-9a-f]{128})\n")
_LENGTH: Final = len("vllmc-signature ") + 64 + len(" ") + 128 + len("\n")
# So that nothing that the key signs elsewhere is taken for a record's signature.
_PURPOSE: Final = b"vllmc signature 1\n"
_HINT: Final = "vllmc trust keygen FILE makes a pair of keys; so does ssh-keygen -t ed25519"


@dataclass(frozen=True, slots=True)
class Signature:
    """What a signature's line says: the public key (32 bytes) and the signature (64 bytes)."""

    key: bytes
    value: bytes

    def is_of(self, data: bytes) -> bool:
        """Whether the key's owner signed `data`."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.key).verify(self.value, _PURPOSE + data)
        except InvalidSignature:
            return False
        return True


def split(data: bytes) -> tuple[bytes, Signature | None]:
    """What is signed, and the signature at its end; all of `data` and None where there is none."""
    match = _LINE.fullmatch(data[-_LENGTH:])
    if match is None:
        return data, None
    key, value = (bytes.fromhex(group.decode("ascii")) for group in match.groups())
    return data[:-_LENGTH], Signature(key, value)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key that signs records."""

    _key: Ed25519PrivateKey

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def signed(self, data: bytes) -> bytes:
        """`data` with the signature's line at its end."""
        value = self._key.sign(_PURPOSE + data)
        return data + f"vllmc-signature {self.public.hex()} {value.hex()}\n".encode("ascii")

    def private_text(self) -> str:
        """The private key as OpenSSH writes it, not encrypted."""
        from cryptography.hazmat.primitives import serialization

        return self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ).decode("ascii")


def generate() -> SigningKey:
    """A new key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return SigningKey(Ed25519PrivateKey.generate())


def load_signing_key(path: Path) -> SigningKey:
    """The private key in a file of OpenSSH's form or PEM (PKCS #8), which is not encrypted.

    Raises `VllmcError` (`bad-signing-key`).
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        # Secrets are mounted as links, and may come by a pipe.
        data = path.read_bytes()
        if b"OPENSSH" in data:
            key: object = serialization.load_ssh_private_key(data, None)
        else:
            key = serialization.load_pem_private_key(data, None)
    except FileNotFoundError:
        raise _bad_key(path, "there is no such file") from None
    except OSError as error:
        raise _bad_key(path, str(error.strerror)) from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _bad_key(path, str(error)) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _bad_key(path, "it is no Ed25519 key")
    return SigningKey(key)


def read_public_key(text: str, source: str) -> bytes:
    """The 32 bytes of a public key in OpenSSH's form (`ssh-ed25519 AAAA...`) or PEM.

    Raises `VllmcError` (`bad-public-key`), which names `source`.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        data = text.strip().encode("ascii")
        if data.startswith(b"ssh-"):
            key: object = serialization.load_ssh_public_key(data)
        else:
            key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _bad_public_key(source, str(error)) from None
    if not isinstance(key, Ed25519PublicKey):
        raise _bad_public_key(source, "it is no Ed25519 key")
    return key.public_bytes_raw()


def public_text(key: bytes, name: str) -> str:
    """The line of a public key as OpenSSH writes it."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    line = Ed25519PublicKey.from_public_bytes(key).public_bytes(*form).decode("ascii")
    return f"{line} {name}\n"


def _bad_key(path: Path, reason: str) -> VllmcError:
    return VllmcError(
        "bad-signing-key",
        f"{path} holds no private key to sign with: {reason}",
        context={"path": str(path)},
        hint=_HINT,
    )


def _bad_public_key(source: str, reason: str) -> VllmcError:
    return VllmcError(
        "bad-public-key",
        f"{source} holds no public key: {reason}",
        context={"source": source},
        hint=f"it begins with 'ssh-ed25519'; {_HINT}",
    )
