from __future__ import annotations

import io
import zipfile

import pytest

from vllmc.core.compiler.container import pack, unpack
from vllmc.core.errors import UnsafeCacheError


def test_what_is_packed_comes_out_again() -> None:
    files = {"b.txt": b"text", "a/kernel.so": bytes(range(256))}
    opened = unpack(pack("kind", {"names": ["x"], "n": 1}, files))
    assert opened.format == "kind"
    assert opened.description == {"names": ["x"], "n": 1}
    assert opened.files == files
    assert opened.text("b.txt") == "text"


def test_the_same_content_gives_the_same_bytes() -> None:
    one = pack("kind", {"a": 1, "b": 2}, {"x": b"1", "y": b"2"})
    other = pack("kind", {"b": 2, "a": 1}, {"y": b"2", "x": b"1"})
    assert one == other
    assert one != pack("kind", {"a": 1, "b": 2}, {"x": b"1", "y": b"3"})


def archive(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, data in files.items():
            opened.writestr(name.replace("__", "."), data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an archive",
        pack("kind", {}, {"x": b"1" * 1000})[:-40],
        archive(x=b"1"),
        archive(manifest__json=b"not json"),
        archive(manifest__json=b"[]"),
        archive(manifest__json=b'{"format":"kind"}'),
        archive(manifest__json=b'{"format":"kind","version":2,"description":{}}'),
    ],
)
def test_anything_else_is_a_bad_artifact(data: bytes) -> None:
    with pytest.raises(UnsafeCacheError) as caught:
        unpack(data)
    assert caught.value.code == "bad-artifact"
