from __future__ import annotations

import pytest

from vllmc.core.cache.layout import Layout
from vllmc.core.errors import VllmcError

KEY, OTHER = "ab" + "0" * 62, "cd" + "1" * 62


@pytest.fixture
def layout(tmp_path):
    return Layout(tmp_path)


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_a_walk_knows_every_path_that_the_layout_gives(layout):
    expected = {
        layout.blob(KEY): ("blobs", KEY, ""),
        layout.unit(KEY): ("units", KEY, ""),
        layout.program(KEY, OTHER): ("programs", KEY, OTHER),
        layout.code(KEY): ("codes", KEY, ""),
        layout.used(KEY): ("used", KEY, ""),
        layout.lock("warm-1"): ("locks", "warm-1", ""),
        layout.temporary / "17.ab": ("tmp", "17.ab", ""),
    }
    for path in expected:
        put(path)
    assert {f.path: (f.section, f.key, f.id) for f in layout.walk()} == expected
    assert [f.key for f in layout.walk("units/ab")] == [KEY]


@pytest.mark.parametrize(
    "name",
    [
        f"blobs/cd/{KEY}",
        f"blobs/ab/{KEY}.json",
        f"blobs/ab/{KEY.upper()}",
        f"units/ab/{KEY}",
        f"programs/ab/{KEY}/readme",
        f"programs/ab/{KEY}.json",
        "notes.txt",
    ],
)
def test_a_file_in_no_known_place_is_foreign(layout, name):
    put(layout.top / name)
    assert [(f.section, f.path) for f in layout.walk()] == [("foreign", layout.top / name)]


def test_a_directory_in_the_place_of_a_file_stands_for_that_file(layout):
    put(layout.blob(KEY) / "inside")
    assert [(f.section, f.path) for f in layout.walk()] == [("blobs", layout.blob(KEY))]


def test_a_link_to_a_directory_is_not_followed(layout, tmp_path):
    put(layout.unit(KEY))
    (layout.top / "units" / "ef").symlink_to(layout.top / "units")
    assert sorted(f.section for f in layout.walk()) == ["foreign", "units"]


def test_what_lies_beside_the_version_directory_is_not_ours(layout):
    put(layout.root / "v2" / "blobs" / "x")
    put(layout.root / "notes.txt")
    assert list(layout.walk()) == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "AB" + "0" * 62, "ab", ""])
def test_a_path_is_made_of_a_whole_digest_only(layout, name):
    for make in (layout.blob, layout.unit, layout.code, layout.used, layout.programs):
        with pytest.raises(AssertionError):
            make(name)


def test_a_file_where_a_directory_belongs_is_an_error(layout):
    put(layout.top)
    with pytest.raises(VllmcError) as caught:
        list(layout.walk())
    assert caught.value.code == "bad-cache-dir"
