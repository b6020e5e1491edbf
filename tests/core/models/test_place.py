from __future__ import annotations

import contextlib
import json.decoder
import traceback

from vllmc.core.models.place import Place, place_in_class, place_of_frames, place_of_trace


def passed_on(function: object) -> object:
    return function


class Base:
    kind = "base"

    @passed_on
    def forward(self) -> None:
        raise ValueError


class Derived(Base):
    pass


class Wrapping(Base):
    @contextlib.contextmanager
    def forward(self) -> object:  # type: ignore[override]
        yield self


def source_of(place: Place | None) -> tuple[str, str]:
    assert place is not None
    return place.module, place.source


def test_a_method_is_found_where_it_is_defined_below_its_decorators() -> None:
    assert source_of(place_in_class(Derived)) == ("Derived.forward", "def forward(self) -> None:")


def test_a_wrapped_method_is_found_behind_its_wrapper() -> None:
    module, source = source_of(place_in_class(Wrapping))
    assert module == "Wrapping.forward"
    assert source.startswith("def forward(self) -> object:")


def test_an_attribute_is_found_where_it_is_assigned() -> None:
    assert source_of(place_in_class(Derived, "kind")) == ("Derived.kind", 'kind = "base"')


def test_what_a_class_does_not_have_is_nowhere() -> None:
    assert place_in_class(Derived, "backward") is None


def test_a_class_without_source_is_nowhere() -> None:
    made = type("Made", (), {"kind": 1})
    assert place_in_class(made, "kind") is None


def test_files_are_named_from_their_package_on() -> None:
    place = place_in_class(json.decoder.JSONDecoder, "decode")
    assert place is not None
    assert place.file == "json/decoder.py"
    assert place.context()["line"] == f"json/decoder.py:{place.line}"


def test_a_file_outside_packages_is_named_alone() -> None:
    place = place_in_class(Base)
    assert place is not None
    assert place.file == "test_place.py"


def test_the_innermost_frame_is_named_with_its_class() -> None:
    try:
        Derived().forward()
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
    assert source_of(place_of_frames(frames)) == ("Base.forward", "raise ValueError")


def test_a_trace_is_read_like_its_frames() -> None:
    try:
        Derived().forward()
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        trace = "".join(traceback.format_tb(error.__traceback__))
    assert place_of_trace(trace) == place_of_frames(frames)


def test_frames_of_torch_are_passed_over() -> None:
    own = traceback.FrameSummary("/venv/site-packages/mine/a.py", 3, "forward", line="x + y")
    inner = traceback.FrameSummary("/venv/site-packages/torch/nn/b.py", 5, "add", line="pass")
    assert source_of(place_of_frames([own, inner])) == ("forward", "x + y")
    assert place_of_frames([inner]) is None
    assert place_of_trace("") is None
