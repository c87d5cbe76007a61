"""Slides that a run knows: what a finished slide may become, and what refuses a command."""

import os
import shutil

import pytest

from scellst_ray import storage
from scellst_ray.runs.documents import publish_sources, read_sources
from scellst_ray.runs.folder import begin_run
from scellst_ray.runs.known_slides import accept_slides, check_moved, moved_uri
from scellst_ray.runs.records import SlideSource
from scellst_ray.runs.sources import sources_of
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.storage import node_cache
from tests.support import cached
from tests.support.object_server import serving
from tests.support.run_folders import Settings

cache = cached.cache  # a fixture
CONTENT = bytes(range(256)) * 40


class Cohort:
    """A manifest, slides a and b next to it, and a run."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "slides").mkdir(parents=True)
        for name in "ab":
            (folder / "slides" / f"{name}.svs").write_bytes(CONTENT)
        self.run = begin_run(str(folder / "run"), "extract", Settings())

    def rows(self, text="a,slides/a.svs,\nb,slides/b.svs,\n", folder=None, header="mpp"):
        manifest = (folder or self.folder) / "m.csv"
        manifest.write_text(f"slide_id,uri,{header}\n{text}")
        return sources_of(read_manifest(str(manifest)), None, imported="segmentation" in header)

    def accept(self, *args, moved=(), **more):
        return accept_slides(self.run, self.rows(*args, **more), self.run.records(), moved)

    def finish(self, name="a", status="done", uri=None, **more):
        uri = uri or str(self.folder / "slides" / f"{name}.svs")
        record = {"slide_id": name, "status": status, "num_cells": 1, "mpp": 0.5}
        record["source"] = f"{node_cache.fingerprint(uri)}-00000000"
        storage.publish_json(self.run.record_uri(name), record | more)

    def known(self):
        return storage.read_json(f"{self.run.uri}/slides.json")


@pytest.fixture
def cohort(tmp_path):
    return Cohort(tmp_path / "cohort")


def lose(path):
    path.unlink()


def touch(path):
    os.utime(path, ns=(5, 5))


def grow(path):
    path.write_bytes(CONTENT + b"more")


def replace(path):
    path.write_bytes(CONTENT[::-1])


@pytest.mark.parametrize("status", ["done", "empty"])
@pytest.mark.parametrize(
    ("change", "warns"), [(lose, False), (touch, False), (grow, True), (replace, True)]
)
def test_a_finished_slide_stays_whatever_becomes_of_its_file(cohort, status, change, warns, caplog):
    cohort.accept()
    cohort.finish(status=status)
    before = cohort.known()["a"]
    change(cohort.folder / "slides" / "a.svs")
    cohort.accept()
    assert cohort.known()["a"] == before
    assert ("another content now: a" in caplog.text) == warns
    if warns:
        assert f"remove its record (such as {cohort.run.record_uri('a')})" in caplog.text


def test_a_finished_slide_is_no_other(cohort):
    cohort.accept()
    cohort.finish()
    before = cohort.known()
    (cohort.folder / "slides" / "c.svs").write_bytes(CONTENT[::-1])
    for text, words in [
        ("a,slides/a.svs,0.25\n", "was read with mpp of its file, and the manifest has mpp 0.25"),
        ("a,slides/c.svs,\n", r"was read from .*a\.svs, and the manifest names .*c\.svs now"),
        ("a,slides/gone.svs,\n", r"the manifest names .*gone\.svs now"),
    ]:
        with pytest.raises(ValueError, match=words) as refusal:
            cohort.accept(f"b,slides/b.svs,\n{text}")
        message = str(refusal.value)
        assert "slide 'a' is finished" in message
        for remedy in ("another --out", "--moved OLD=NEW", "records/a.json"):
            assert remedy in message
        assert cohort.known() == before


def test_the_mpp_that_the_file_states_may_be_written_into_the_manifest(cohort):
    cohort.accept()
    cohort.finish()
    cohort.accept("a,slides/a.svs,0.5\n")
    cohort.accept("a,slides/a.svs,\n")


@pytest.mark.parametrize("status", ["partial", "failed", None])
@pytest.mark.parametrize(
    "text", ["a,slides/c.svs,\n", "a,slides/a.svs,0.25\n", "a,slides/gone.svs,\n"]
)
def test_an_unfinished_slide_may_become_any_other(cohort, status, text):
    assert cohort.accept() == set()
    assert cohort.accept() == {"a", "b"}
    if status:
        cohort.finish(status=status)
    # A driver may die right after it has written this, so the change stays known.
    for _ in range(2):
        assert cohort.accept(f"{text}b,slides/b.svs,\n") == {"b"}
        assert cohort.known()["a"]["changed"] is True
    assert cohort.accept() == {"b"}


def test_a_manifest_may_grow_and_name_few(cohort):
    cohort.accept("a,slides/a.svs,\n")
    cohort.finish()
    cohort.accept("b,slides/b.svs,\n")
    assert set(cohort.known()) == {"a", "b"}


def test_a_slide_under_another_name(cohort):
    cohort.accept()
    cohort.finish()
    (cohort.folder / "archive").mkdir()
    shutil.move(cohort.folder / "slides" / "a.svs", cohort.folder / "archive" / "old.svs")
    cohort.accept("a,archive/old.svs,\n")
    known = cohort.known()["a"]
    assert known["uri"] == str(cohort.folder / "archive" / "old.svs")
    assert known["named"] == "archive/old.svs"
    assert known["bytes"] == len(CONTENT)


def test_manifest_slides_and_run_moved_together(cohort, tmp_path):
    cohort.accept()
    cohort.finish("a")
    cohort.finish("b")
    shutil.move(cohort.folder, tmp_path / "elsewhere")
    cohort.run = begin_run(str(tmp_path / "elsewhere" / "run"), "extract", Settings())
    (tmp_path / "elsewhere" / "slides" / "a.svs").unlink()  # archived
    cohort.accept(folder=tmp_path / "elsewhere")
    assert cohort.known()["a"]["uri"] == str(tmp_path / "elsewhere" / "slides" / "a.svs")
    # Slides of the same names in another cohort are others.
    (tmp_path / "another" / "slides").mkdir(parents=True)
    (tmp_path / "another" / "slides" / "b.svs").write_bytes(CONTENT[::-1])
    with pytest.raises(ValueError, match="slide 'b' is finished"):
        cohort.accept(folder=tmp_path / "another")


def test_a_move_that_is_told(cohort, tmp_path):
    gone = f"a,{tmp_path}/tape=1/slides/a.svs,\n"
    cohort.accept()
    cohort.finish()
    with pytest.raises(ValueError, match="--moved OLD=NEW"):
        cohort.accept(gone)
    with pytest.raises(ValueError, match="--moved OLD=NEW"):
        cohort.accept(gone, moved=[f"{cohort.folder}/slide={tmp_path}/tape=1/slide"])
    cohort.accept(gone, moved=["/not/this=/one", f"{cohort.folder}={tmp_path}/tape=1"])
    cohort.accept(gone)  # it is known from now on
    assert moved_uri("s3://old/=s3://new", "s3://old/a=1/x.svs") == "s3://new/a=1/x.svs"
    check_moved(["/a=/b"])
    for text in ("/a", "=/b", "/a="):
        with pytest.raises(ValueError, match="is not OLD=NEW"):
            check_moved([text])


def test_imported_nuclei_of_a_finished_slide(cohort, caplog):
    nuclei = cohort.folder / "slides" / "a.geojson"
    nuclei.write_text("[]")
    rows, header = "a,slides/a.svs,slides/a.geojson\n", "segmentation"
    cohort.accept(rows, header=header)
    mark = str(node_cache.fingerprint(str(nuclei)))
    cohort.finish(imported={"fingerprint": mark})
    nuclei.unlink()
    cohort.accept(rows, header=header)
    assert caplog.text == ""
    nuclei.write_text("[1]")
    cohort.accept(rows, header=header)
    assert "another content now: a" in caplog.text
    (cohort.folder / "other.geojson").write_text("[2]")
    with pytest.raises(ValueError, match=r"nuclei were imported from .*a\.geojson, and the"):
        cohort.accept("a,slides/a.svs,other.geojson\n", header=header)
    (cohort.folder / "copy.geojson").write_text("[]")
    cohort.accept("a,slides/a.svs,copy.geojson\n", header=header)
    assert cohort.known()["a"]["segmentation"] == str(cohort.folder / "copy.geojson")


def test_records_of_an_earlier_release(cohort, caplog):
    cohort.accept()
    cohort.finish(source=None)
    record = storage.read_json(cohort.run.record_uri("a"))
    del record["source"]
    storage.publish_json(cohort.run.record_uri("a"), record)
    slide = cohort.folder / "slides" / "a.svs"
    replace(slide)  # as many bytes: it cannot be noticed
    cohort.accept()
    assert caplog.text == ""
    grow(slide)
    cohort.accept()
    assert "another content now: a" in caplog.text
    with pytest.raises(ValueError, match="slide 'a' is finished"):
        cohort.accept("a,slides/b.svs,\n")


@pytest.mark.usefixtures("cache")
def test_finished_slides_on_an_object_store_cost_no_request(cohort):
    with serving({"a.svs": b"first", "copy.svs": b"first", "b.svs": b"other"}) as (at, objects):
        cohort.accept(f"a,{at}/a.svs,\n")
        cohort.finish(uri=f"{at}/a.svs")
        objects.asked.clear()
        cohort.accept(f"a,{at}/a.svs,\n")
        assert objects.asked == []
        cohort.accept(f"a,{at}/copy.svs,\n")
        with pytest.raises(ValueError, match="slide 'a' is finished"):
            cohort.accept(f"a,{at}/b.svs,\n")
        assert objects.gets() == 0


def without_entry(cohort, name="a", *, file_too=False):
    """Lose the entry of a slide, as an editor may; or all of slides.json."""
    uri = f"{cohort.run.uri}/slides.json"
    known = read_sources(uri, SlideSource, "")
    storage.remove_tree(uri)
    if not file_too:
        publish_sources(uri, {key: value for key, value in known.items() if key != name})


@pytest.mark.parametrize("file_too", [False, True])
@pytest.mark.parametrize("change", [None, lose, touch])
def test_a_finished_slide_without_an_entry(cohort, caplog, change, file_too):
    cohort.accept()
    cohort.finish()
    before = cohort.known()
    without_entry(cohort, file_too=file_too)
    if change is not None:
        change(cohort.folder / "slides" / "a.svs")
    cohort.accept()
    assert "slides.json: lacked 1 finished slide(s): a. " in caplog.text
    if change is not lose:  # else its size is not known
        assert cohort.known() == before
    caplog.clear()
    cohort.accept()
    assert caplog.text == ""


@pytest.mark.parametrize("file_too", [False, True])
@pytest.mark.parametrize(
    ("change", "row", "words"),
    [
        (grow, "a,slides/a.svs,", r"was read from another uri than .*a\.svs"),
        (replace, "a,slides/a.svs,", r"was read from another uri than .*a\.svs"),
        (None, "a,slides/b.svs,", r"was read from another uri than .*b\.svs"),
        (None, "a,slides/a.svs,0.25", r"was read with mpp 0\.5, and the manifest has mpp 0\.25"),
    ],
)
def test_a_slide_without_an_entry_may_not_be_another_one(cohort, change, row, words, file_too):
    cohort.accept()
    (cohort.folder / "slides" / "b.svs").write_bytes(CONTENT[::-1])
    cohort.finish()
    without_entry(cohort, file_too=file_too)
    if change is not None:
        change(cohort.folder / "slides" / "a.svs")
    with pytest.raises(ValueError, match=words):
        cohort.accept(f"{row}\nb,slides/b.svs,\n")


@pytest.mark.usefixtures("cache")
def test_a_slide_on_a_store_without_an_entry(cohort):
    with serving({"a.svs": b"first", "b.svs": b"other"}) as (at, _):
        cohort.accept(f"a,{at}/a.svs,\n")
        cohort.finish(uri=f"{at}/a.svs")
        without_entry(cohort)
        with pytest.raises(ValueError, match="was read from another uri"):
            cohort.accept(f"a,{at}/b.svs,\n")
        cohort.accept(f"a,{at}/a.svs,\n")


def test_other_colours_than_those_of_a_finished_slide(cohort):
    slides = read_manifest(_manifest(cohort))
    first, second = ({"a": ((n,) * 3, (0.1,) * 3)} for n in (0.5, 0.6))
    accept_slides(cohort.run, sources_of(slides, first, imported=False), {})
    cohort.finish()
    records = cohort.run.records()
    accept_slides(cohort.run, sources_of(slides, first, imported=False), records)
    with pytest.raises(ValueError, match="normalised by other colours"):
        accept_slides(cohort.run, sources_of(slides, second, imported=False), records)


def _manifest(cohort):
    cohort.rows()
    return str(cohort.folder / "m.csv")
