from __future__ import annotations

from vllmc.cli.toml_lines import line_numbers

TEXT = """# a comment
top = 1
list = [
    "[[no.table]]",
]

[table]   # another
key = \"\"\"
x = 1
\"\"\"
inner.part = true

[[rows]]
key = 1
[rows.below]
deep = 2

[[rows]]
[[rows.more]]
one = 1
[[rows.more]]
one = 2
"""


def test_each_key_and_table_has_the_line_where_it_begins() -> None:
    assert line_numbers(TEXT) == {
        ("top",): 2,
        ("list",): 3,
        ("table",): 7,
        ("table", "key"): 8,
        ("table", "inner"): 11,
        ("table", "inner", "part"): 11,
        ("rows",): 13,
        ("rows", "0"): 13,
        ("rows", "0", "key"): 14,
        ("rows", "0", "below"): 15,
        ("rows", "0", "below", "deep"): 16,
        ("rows", "1"): 18,
        ("rows", "1", "more"): 19,
        ("rows", "1", "more", "0"): 19,
        ("rows", "1", "more", "0", "one"): 20,
        ("rows", "1", "more", "1"): 21,
        ("rows", "1", "more", "1", "one"): 22,
    }


def test_nothing_has_no_lines() -> None:
    assert line_numbers("") == {}
