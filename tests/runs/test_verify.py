import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from scellst_ray import storage
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.documents import publish_document
from scellst_ray.runs.folder import begin_run
from scellst_ray.runs.shards import publish_shard
from scellst_ray.runs.thumbnails import publish_thumbnail
from scellst_ray.runs.verify import verify_run
from tests.runs.test_shards import cells_of, receipt, receipts_of
from tests.support.crop_runs import write_crop_run
from tests.support.exported_runs import make_run

ARCHIVES = Path(__file__).parents[1] / "archives"


class Plain:
    def as_json(self):
        return {"encoder": "none"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a done, a partial and an unfinished slide, and crops."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = begin_run(str(folder), "extract", Plain(), {"core_px": 320})
    for slide_id, num_tiles in (("S", 1), ("P", 2), ("U", 2)):
        name = f"{slide_id.lower()}.parquet"
        publish_shard(run, name, cells_of(slide_id, 0, 4))
        rows = [receipt(slide_id, 0, num_tiles, 4, name)]
        if slide_id == "P":
            rows.append(receipt("P", 1, 2, 0, None) | {"error": "lost", "shard_row": None})
        run.log_receipts(receipts_of(*rows))
        if slide_id != "U":
            finish_slide(run, slide_id, receipts_of(*rows))
    storage.remove_tree(run.shard_uri("s.parquet"))
    sources = {slide_id: {"uri": f"{slide_id}.tiff", "mpp": None} for slide_id in "SPU"}
    storage.publish_json(f"{run.uri}/slides.json", sources)
    write_index(run)
    return folder


def write_index(run):
    """Add crops of slide S to a run, as the driver publishes them."""
    write_crop_run(run.uri, {"S": 3})
    index = storage.read_json(f"{run.uri}/crops/crops.json")
    sample = {"total": 9, "per_slide": None, "per_type": None, "seed": 0}
    more = {"codec": "jpeg", "num_crops": 3, "run_digest": run.digest, "sample": sample}
    publish_document(f"{run.uri}/crops/crops.json", index | more)


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def found_in(run):
    return [(finding.path, finding.kind) for finding in verify_run(str(run)).findings]


def test_a_whole_run(run):
    found = verify_run(str(run))
    assert found.findings == []
    # Four documents and 2 records, 2 CELLS and 1 FAILURES, 3 files of the log, crops, 2 shards.
    assert (found.num_files, found.num_unstamped) == (15, 1)


FILES = (
    "run.json",
    "slides.json",
    "records/S.json",
    "records/P.json",
    "cells/S.parquet",
    "cells/P.parquet",
    "failures/P.parquet",
    "receipts/*.parquet",
    "shards/p.parquet",
    "shards/u.parquet",
    "crops/crops.json",
    "crops/set/S.parquet",
)


# Without a checksum: a value that is still one of its kind is believed.
PLAIN = ("run.json", "slides.json")


def flipped(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


DAMAGES = {
    "cut": lambda c: c[: len(c) // 2],
    "empty": lambda c: c[:0],
    "zeros": lambda c: bytes(len(c)),
    "null": lambda _: b"null",
    "deep": lambda _: b"[" * 50_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_each_damage_of_each_file_is_named(run, name, damage):
    path = min(run.glob(name))
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    findings = [f for f in verify_run(str(run)).findings if f.path == str(path.relative_to(run))]
    assert [f.kind for f in findings if f.kind != "passed over"] == ["damaged"]
    assert findings[0].remedy


@pytest.mark.parametrize("name", [name for name in FILES if name not in PLAIN])
def test_one_flipped_bit_is_found(run, name):
    path = min(run.glob(name))
    path.write_bytes(flipped(path.read_bytes()))
    assert str(path.relative_to(run)) in {f.path for f in verify_run(str(run)).problems}


@pytest.mark.parametrize("name", ["cells/S.parquet", "failures/P.parquet", "crops/set/S.parquet"])
def test_an_absent_table_is_missing(run, name):
    (run / name).unlink()
    assert found_in(run) == [(name, "missing")]


def test_exchanged_tables_are_foreign(run):
    one, two = (run / "cells" / f"{slide_id}.parquet" for slide_id in "SP")
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    assert found_in(run) == [("cells/P.parquet", "foreign"), ("cells/S.parquet", "foreign")]


def test_exchanged_shards_are_foreign(run):
    shutil.copyfile(run / "shards/u.parquet", run / "shards/p.parquet")
    assert found_in(run) == [("shards/p.parquet", "foreign")]


def test_a_changed_identity_is_found(run):
    info = json.loads((run / "run.json").read_text())
    info["identity"]["encoder"] = "other"
    (run / "run.json").write_text(json.dumps(info))
    assert found_in(run) == [("run.json", "damaged")]


def test_files_of_somebody_else_are_no_problem(run):
    names = ("cells/old.parquet", "records/Thumbs.db", "receipts/notes.txt", "failures/S.parquet~")
    for name in names:
        (run / name).write_bytes(b"hello")
    (run / "records" / ".DS_Store").write_bytes(b"hello")
    assert found_in(run) == sorted((name, "passed over") for name in names)
    assert verify_run(str(run)).problems == []


def test_a_run_on_an_object_store(run):
    uri = "memory://verify/run"
    fs, path = storage.resolve(uri)
    fs.put(f"{run}/", path, recursive=True)
    assert verify_run(uri).findings == []
    storage.publish_bytes(f"{uri}/cells/S.parquet", b"PAR1")
    assert [(f.path, f.kind) for f in verify_run(uri).findings] == [("cells/S.parquet", "damaged")]
    fs.rm("/verify", recursive=True)


@pytest.mark.parametrize("name", ["run", "interrupted"])
def test_runs_of_the_first_release(name):
    found = verify_run(str(ARCHIVES / "v1" / name))
    assert found.problems == []
    assert found.num_unstamped == (3 if name == "run" else 0)


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run of scellst_ray"):
        verify_run(str(tmp_path))


def test_a_table_of_an_earlier_release_is_read_in_full(run):
    record = storage.read_json(f"{run}/records/S.json")
    del record["files"], record["checksum"]
    storage.publish_json(f"{run}/records/S.json", record)
    table = storage.read_table(f"{run}/cells/S.parquet")
    moved = table.set_column(2, "x0", pa.array(table["x0"].to_numpy() + np.float32(1)))
    storage.publish_table(f"{run}/cells/S.parquet", moved.cast(table.schema))
    assert verify_run(str(run)).num_unstamped == 2
    content = (run / "cells/S.parquet").read_bytes()
    (run / "cells/S.parquet").write_bytes(content[:30] + b"\7" + content[31:])
    assert found_in(run) == [("cells/S.parquet", "damaged")]


def test_thumbnails_and_profiles_are_files_of_a_run(tmp_path):
    run = make_run(tmp_path, head=True)
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    origin = {"slide_id": "a", "source": None, "ratio": 10.0}
    publish_thumbnail(run.folder.thumbnail_uri("a"), picture, origin)
    before = verify_run(run.uri)
    assert before.findings == []
    (tmp_path / "run/thumbnails/a.jpg").rename(tmp_path / "run/thumbnails/b.jpg")
    assert found_in(run.uri) == [("thumbnails/b.jpg", "foreign")]
    for name, damage in DAMAGES.items():
        publish_thumbnail(run.folder.thumbnail_uri("b"), picture, origin | {"slide_id": "b"})
        path = tmp_path / "run/thumbnails/b.jpg"
        path.write_bytes(damage(path.read_bytes()))
        assert found_in(run.uri) == [("thumbnails/b.jpg", "damaged")], name
    (tmp_path / "run/thumbnails/b.jpg").unlink()
    assert verify_run(run.uri).num_files == before.num_files - 1
