from __future__ import annotations

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


def test_nothing_stands_between_or_after_the_files() -> None:
    data = pack("kind", {}, {"b": b"22", "a": b"1\n1", "empty": b""})
    assert data.split(b"\n", 1)[1] == b"1\n122"


HEADER = pack("kind", {}, {"x": b""})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no header",
        pack("kind", {}, {"x": b"1" * 1000})[:-40],
        pack("kind", {}, {"x": b"1" * 1000}) + b"1",
        HEADER.removesuffix(b"\n"),
        HEADER.replace(b'"x",0', b'"x",-1'),
        HEADER.replace(b'"x",0', b'"x","0"'),
        HEADER.replace(b'"x",0', b'"x"'),
        HEADER.replace(b'"format":"kind",', b""),
        HEADER.replace(b'"version":2', b'"version":1'),
        b"not json\n",
        b"[]\n",
    ],
)
def test_anything_else_is_a_bad_artifact(data: bytes) -> None:
    with pytest.raises(UnsafeCacheError) as caught:
        unpack(data)
    assert caught.value.code == "bad-artifact"
