import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scellst_ray import open_run, storage
from scellst_ray.runs import tables
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import begin_run
from scellst_ray.runs.shards import publish_shard
from tests.runs.test_shards import cells_of, receipt, receipts_of


class Plain:
    def as_json(self):
        return {"encoder": "none"}


def make_run(folder, x0=0.0):
    """Return a run folder with the slides S and T, of 4 cells each."""
    run = begin_run(str(folder), "extract", Plain())
    for slide_id in "ST":
        publish_shard(run, f"{slide_id}.parquet", cells_of(slide_id, 0, 4, x0))
        row = receipt(slide_id, 0, 2, 4, f"{slide_id}.parquet")
        failed = receipt(slide_id, 1, 2, 0, None) | {"error": "lost", "shard_row": None}
        finish_slide(run, slide_id, receipts_of(row, failed))
    return run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def readers(run):
    """Return the ways to read CELLS of slide S."""
    opened = open_run(run.uri)
    return {
        "all columns": lambda: opened.cells("S"),
        "some columns": lambda: opened.cells("S", ["x0"]),
        "a frame": lambda: opened.cells_frame(["S"]),
        "a stage": lambda: tables.read_slide_table(run, "S", "CELLS", ["cell_id", "x0"]),
    }


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES = {
    "cut": lambda c: c[: len(c) // 2],
    "empty": lambda c: c[:0],
    "footer": lambda c: flipped(c, len(c) - 40),
    "seal": lambda c: flipped(c, c.rindex(b"scell\0s1") + 20),
    "page": lambda c: c[:20] + bytes(200) + c[220:],
    "longer": lambda c: c + b"\0",
}


@pytest.mark.parametrize("reader", ["all columns", "some columns", "a frame", "a stage"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_table_is_refused_with_the_remedy(run, reader, kind):
    uri = run.cells_uri("S")
    storage.publish_bytes(uri, DAMAGES[kind](storage.read_bytes(uri)))
    message = r"cells/S\.parquet: .*remove records/S\.json and run the same command again"
    with pytest.raises(storage.DamagedFileError, match=message):
        readers(run)[reader]()


@pytest.mark.parametrize("reader", ["all columns", "some columns", "a frame", "a stage"])
def test_a_table_of_another_slide_is_refused(run, reader):
    shutil.copyfile(run.cells_uri("T"), run.cells_uri("S"))
    with pytest.raises(storage.DamagedFileError, match=r"cells/S\.parquet: "):
        readers(run)[reader]()


def test_a_table_of_another_slide_is_refused_without_stamps(run):
    """Also a run of an earlier release, whose records hold no stamps."""
    for slide_id in "ST":
        record = storage.read_json(run.record_uri(slide_id))
        bare = {k: v for k, v in record.items() if k not in ("files", "checksum")}
        storage.publish_json(run.record_uri(slide_id), bare)
        table = pq.read_table(run.cells_uri(slide_id))
        pq.write_table(table, run.cells_uri(slide_id))
    assert len(open_run(run.uri).cells("S")) == 4
    shutil.copyfile(run.cells_uri("T"), run.cells_uri("S"))
    with pytest.raises(storage.DamagedFileError, match="holds slide 'T', not 'S'"):
        open_run(run.uri).cells("S", ["x0"])


def test_a_table_of_an_earlier_time_is_refused(run, tmp_path):
    other = make_run(tmp_path / "other", x0=1000.0)
    shutil.copyfile(other.cells_uri("S"), run.cells_uri("S"))
    with pytest.raises(storage.DamagedFileError, match="is not the file that was written"):
        open_run(run.uri).cells("S", ["y0"])


def test_an_absent_table_is_named_with_the_remedy(run):
    Path(run.cells_uri("S")).unlink()
    with pytest.raises(FileNotFoundError, match=r"cells/S\.parquet: is absent.*records/S\.json"):
        open_run(run.uri).cells("S")


def test_a_record_that_names_no_tables_is_not_an_empty_slide(run):
    storage.publish_json(run.record_uri("S"), {"slide_id": "S", "status": "done"})
    with pytest.raises(storage.DamagedFileError, match=r"records/S\.json: does not say which"):
        open_run(run.uri).cells("S")


def test_failures_are_checked_too(run):
    assert open_run(run.uri).failures()["slide_id"].to_list() == ["S", "T"]
    shutil.copyfile(run.failures_uri("T"), run.failures_uri("S"))
    with pytest.raises(storage.DamagedFileError, match=r"failures/S\.parquet: "):
        open_run(run.uri).failures()


def test_stamps_are_those_of_the_files(run):
    record = open_run(run.uri).records["S"]
    for name in ("CELLS", "FAILURES"):
        path = Path(tables.table_uri(run, name, "S"))
        assert tables.stamp_in(record, name) == storage.stamp_of(path)
    assert tables.stamp_in(record, "EXPRESSION") is None
    with pytest.raises(storage.DamagedFileError, match="its digest differs"):
        tables.check_digest(run.cells_uri("T"), tables.stamp_in(record, "CELLS"))


def test_a_table_whose_pages_end_early(run):
    class Short:
        metadata = pq.read_metadata(run.cells_uri("S"))

        def read(self, columns):
            return pa.table({name: [1] for name in columns})

    with pytest.raises(pa.ArrowInvalid, match="1 of 4 rows can be read"):
        tables.read_rows(Short(), ["x0"])
