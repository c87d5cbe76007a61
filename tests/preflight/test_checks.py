"""Slides that cannot be reached are all reported at once, and stop no run."""

import logging

import pytest

from scellst_ray import storage
from scellst_ray.preflight import checks
from scellst_ray.preflight.checks import (
    Problem,
    find_slides,
    format_problems,
    missing_files,
    size_of,
    stop_or_warn,
)
from scellst_ray.slides.manifest import SlideRow
from tests.support.object_server import serving


@pytest.fixture
def files(tmp_path):
    (tmp_path / "good.svs").write_bytes(b"x" * 10)
    (tmp_path / "empty.svs").touch()
    (tmp_path / "plain.JPG").write_bytes(b"x")
    (tmp_path / "folder.mrxs").mkdir()
    return tmp_path


def row(name, uri, mpp=None, mpp_error=None, **columns):
    return SlideRow(name, str(uri), mpp, mpp_error, columns)


def test_every_slide_is_asked_for(files):
    slides = [
        row("good", files / "good.svs"),
        row("empty", files / "empty.svs"),
        row("gone", files / "gone.svs"),
        row("plain", files / "plain.JPG"),
        row("known", files / "plain.JPG", 0.5),
        row("odd", files / "gone.svs", None, "mpp 9 is outside 0.1-1.2"),
        row("folder", files / "folder.mrxs"),
    ]
    found = find_slides(slides)
    assert found.num_bytes == {"good": 10, "plain": 1, "known": 1, "folder": 0}
    assert set(found.reasons) == {"empty", "gone", "plain", "odd"}
    assert "empty.svs: the file is empty" in found.reasons["empty"]
    assert "the resolution (mpp) is unknown; give the true value" in found.reasons["plain"]
    for part in ("mpp 9 is outside", "no such file", "correct the manifest"):
        assert part in found.reasons["odd"]
    assert len(found.local) == 4
    assert (found.largest_remote, found.num_unasked) == (0, 0)
    assert not any(problem.stops for problem in found.problems)
    assert all(problem.text.startswith("slide ") for problem in found.problems)


def test_a_file_that_may_not_be_read(files, monkeypatch):
    monkeypatch.setattr(checks.os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(PermissionError, match="may not read it"):
        size_of(str(files / "good.svs"))


def test_imported_nuclei_are_asked_for_too(files):
    slides = [
        row("fine", files / "good.svs", segmentation=str(files / "plain.JPG")),
        row("none", files / "good.svs"),
        row("gone", files / "good.svs", segmentation=str(files / "gone.json")),
    ]
    assert find_slides(slides).reasons == {}
    reasons = find_slides(slides, imported=True).reasons
    assert set(reasons) == {"none", "gone"}
    assert "no file in column segmentation" in reasons["none"]
    assert "gone.json: no such file" in reasons["gone"]


def test_what_is_remote_is_asked_for_and_not_fetched():
    with serving({"a.svs": b"x" * 1234, "b.svs": b""}) as (url, objects):
        slides = [row(name, f"{url}/{name}.svs?token=secret") for name in ("a", "b", "c")]
        found = find_slides(slides)
    assert found.largest_remote == found.num_bytes["a"] == 1234
    assert set(found.reasons) == {"b", "c"}
    assert found.local == []
    assert objects.gets("/a.svs") == 0
    assert "secret" not in str(found.problems)


def test_asking_comes_to_an_end(files, monkeypatch):
    monkeypatch.setattr(checks, "ASK_S", -1.0)
    found = find_slides([row("a", files / "good.svs"), row("b", files / "gone.svs")])
    assert (found.num_unasked, found.reasons) == (2, {})
    assert "2 slides were not checked" in found.problems[0].text


def test_all_in_one_message_those_that_stop_first():
    slides = [Problem(f"slide {number}: gone", stops=False) for number in range(30)]
    problems = [*slides, Problem("output: full"), Problem("node b: no weights")]
    lines = format_problems(problems)
    assert lines[:3] == ["output: full", "node b: no weights", "slide 0: gone"]
    assert lines[-1] == "... and 10 more"
    with pytest.raises(ValueError, match=r"^2 problem\(s\) must be solved") as stopped:
        stop_or_warn(problems, logging.getLogger("test"))
    assert [line.removeprefix("- ") for line in str(stopped.value).splitlines()[1:-1]] == lines


def test_slides_alone_stop_nothing(caplog):
    logger = logging.getLogger("test")
    stop_or_warn([Problem("slide a: gone", stops=False)], logger)
    (record,) = caplog.records
    assert "- slide a: gone" in record.getMessage()
    stop_or_warn([], logger)
    assert len(caplog.records) == 1


def test_a_folder_of_folders_on_a_store_is_there():
    """Space Ranger's `outs` may hold folders alone."""
    outs = "memory://checks/outs"
    storage.publish_bytes(f"{outs}/spatial/tissue_positions.csv", b"barcode")
    row = SlideRow("s", "memory://checks/s.svs", None, columns={"spots": outs})
    assert missing_files(row) == []
    absent = SlideRow("s", "memory://checks/s.svs", None, columns={"spots": f"{outs}2"})
    assert missing_files(absent) == [f"spots: {outs}2: no such folder"]
    storage.remove_tree("memory://checks")
