"""The driver alone: receipts in, log and records out, whatever comes twice, late or not at all."""

import threading
import time

import pyarrow as pa
import pytest
import ray.data
import shapely

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.pipelines import driver as driver_module
from scellst_ray.pipelines import extract
from scellst_ray.pipelines.driver import Driver
from scellst_ray.pipelines.finishing import finish_slides
from scellst_ray.pipelines.incomplete import MAX_PARTS
from scellst_ray.pipelines.progress import Progress
from scellst_ray.runs.folder import RunFolder, begin_run
from scellst_ray.runs.identity import NetworkIdentity, RunIdentity
from scellst_ray.runs.lease import LeaseError, hold_lease
from scellst_ray.runs.receipt_sources import with_source
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.stages.tiles import MAX_CELLS_PER_TILE
from tests.support.run_folders import Settings


@pytest.fixture
def run(tmp_path):
    return begin_run(str(tmp_path / "run"), "extract", Settings({"encoder": "none"}))


def receipts(slide_id, tiles, num_tiles, shard=None, num_cells=1):
    """Return receipts of some tiles of a slide."""
    rows = [
        {
            "slide_id": slide_id,
            "tile_id": tile,
            "num_tiles": num_tiles,
            "num_cells": num_cells,
            "shard": shard,
            "shard_row": index * num_cells,
        }
        for index, tile in enumerate(tiles)
    ]
    return pa.Table.from_pylist(rows, schema=schemas.RECEIPTS)


OUTLINE = shapely.to_wkb(shapely.box(0, 0, 2, 2))


def write_shard(run, name, **tiles_of):
    """Write one cell for each of some tiles of some slides."""
    tiles = [tile for tiles in tiles_of.values() for tile in tiles]
    size = len(tiles)
    columns = {
        "slide_id": [slide_id for slide_id, tiles in tiles_of.items() for _ in tiles],
        "cell_id": [tile * MAX_CELLS_PER_TILE for tile in tiles],
        "x0": [1.0] * size,
        "y0": [1.0] * size,
        "area_um2": [1.0] * size,
        "nucleus_type": ["nucleus"] * size,
        "type_prob": [None] * size,
        "polygon": [OUTLINE] * size,
        "seam": [0] * size,
    }
    table = pa.table(columns, schema=pa.schema(schemas.SHARD_FIELDS))
    storage.publish_table(run.shard_uri(name), table)


def at(table, shard, row):
    """Return a receipt of one tile with the place of its cell."""
    table = table.set_column(table.schema.get_field_index("shard"), "shard", pa.array([shard]))
    return table.set_column(table.schema.get_field_index("shard_row"), "shard_row", pa.array([row]))


def present_slides(folder, *names):
    """Write a file for each slide; return the rows of their manifest."""
    for name in names:
        (folder / f"{name}.svs").write_bytes(name.encode())
    return [SlideRow(name, str(folder / f"{name}.svs"), None) for name in names]


def driver_of(run, num_slides=1, check=lambda: None):
    return Driver(run, Progress(num_slides), lambda _: None, check)


def take(driver, *tables):
    for table in tables:
        driver._take(table)
    return driver


def complete_slides(driver):
    """Return the tiles of the slides that may be finished."""
    return {s: sorted(t["tile_id"].to_pylist()) for s, t in driver.unlogged_complete}


def test_a_tile_that_comes_twice_is_one_tile(run):
    driver = take(driver_of(run), receipts("a", [0, 1], 3), receipts("a", [1], 3))
    assert complete_slides(driver) == {}
    assert driver.progress.num_tiles == driver.progress.num_cells == 2
    take(driver, receipts("a", [2], 3))
    assert complete_slides(driver) == {"a": [0, 1, 2]}
    # Which receipt counts does not depend on their order, as in the log.
    both, one = receipts("b", [0, 1], 2, "x"), receipts("b", [1], 2, "y")
    for order in ((both.slice(1), one), (one, both.slice(1))):
        driver = take(driver_of(run), *order, both.slice(0, 1))
        ((_, table),) = driver.unlogged_complete
        shards = dict(zip(table["tile_id"].to_pylist(), table["shard"].to_pylist(), strict=True))
        assert shards == {0: "x", 1: "y"}


def test_what_comes_after_a_slide_is_whole_is_dropped(run, caplog):
    driver = take(driver_of(run), receipts("a", [0, 1], 2), receipts("a", [1], 2))
    assert complete_slides(driver) == {"a": [0, 1]}
    assert "came twice" in caplog.text
    driver._log()
    assert len(run.receipts()) == 2
    assert driver.progress.num_tiles == 2


def test_many_small_receipts_of_a_slide_stay_few_tables(run):
    driver = take(driver_of(run), *(receipts("a", [tile], 500) for tile in range(499)))
    assert len(driver.incomplete.parts["a"]) <= MAX_PARTS
    assert sum(map(len, driver.incomplete.parts["a"])) == 499
    take(driver, receipts("a", [499], 500))
    assert complete_slides(driver) == {"a": list(range(500))}
    assert driver.progress.num_tiles_known == 500


def test_slides_without_tiles_are_whole_at_once(run):
    nothing = receipts("empty", [-1], 0, num_cells=0)
    driver = take(driver_of(run), pa.concat_tables([nothing, receipts("a", [0], 2)]))
    assert complete_slides(driver) == {"empty": [-1]}
    assert driver.progress.num_tiles == 1


def test_a_slide_that_cannot_be_finished_costs_no_other_anything(run):
    write_shard(run, "s.parquet", good=[0, 1])
    tables = [
        receipts("good", [0, 1], 2, "s.parquet"),
        receipts("lost", [0], 1, "gone.parquet"),
        receipts("none", [-1], 0, num_cells=0),
    ]
    good, lost, none = finish_slides(run, pa.concat_tables(tables), imported=False)
    assert (good["status"], good["num_cells"]) == ("done", 2)
    assert (none["status"], none["num_cells"]) == ("empty", 0)
    assert (lost["status"], lost["stage"]) == ("failed", "finish")
    assert "gone.parquet" in lost["error"]
    # An unfinished slide has no record: the next run tries it again.
    assert set(run.records()) == {"good", "none"}


def test_a_damaged_shard_is_named_and_removed_and_its_slide_forgotten(run, caplog):
    write_shard(run, "s.parquet", good=[0, 1])
    write_shard(run, "t.parquet", bad=[0, 1])
    uri = run.shard_uri("t.parquet")
    storage.publish_bytes(uri, storage.read_bytes(uri)[:-9])
    tables = [receipts("good", [0, 1], 2, "s.parquet"), receipts("bad", [0, 1], 2, "t.parquet")]
    found = {r["slide_id"]: r for r in finish_slides(run, pa.concat_tables(tables), imported=False)}
    assert "damaged_shards" not in found["good"]
    assert found["bad"]["damaged_shards"] == ["t.parquet"]
    assert set(run.records()) == {"good"}
    driver = take(driver_of(run), *tables)
    driver.incomplete.forget(tables[1])
    assert (driver.progress.num_tiles, driver.progress.num_tiles_known) == (2, 2)
    assert driver.progress.num_cells == 2
    driver.progress.records |= found
    driver.damaged = {"bad": ["t.parquet"]}
    assert driver.remove_damaged() == ["bad"]
    assert "shards/t.parquet: is damaged" in caplog.text
    assert [name.rsplit("/", 1)[-1] for name in storage.list_files(run.shards_uri)] == ["s.parquet"]


def test_resume_takes_up_what_has_a_shard(run, cells_spec, tmp_path):
    write_shard(run, "h.parquet", half=[0, 1])
    write_shard(run, "w.parquet", whole=[0, 1])
    failed = receipts("half", [2], 4, num_cells=0).to_pylist()[0] | {"error": "lost"}
    for table in (
        receipts("other", [5], 9, "not asked for"),
        receipts("half", [1, 0], 4, "h.parquet"),
        receipts("whole", [0], 2, "w.parquet"),
        receipts("gone", [0, 1], 2, "gone.parquet"),
        pa.Table.from_pylist([failed], schema=schemas.RECEIPTS),
        receipts("whole", [1], 2, "w.parquet"),
        receipts("half", [3], 4, num_cells=0),
    ):
        run.log_receipts(table)
    slides = present_slides(tmp_path, "gone", "half", "new", "whole")
    driver = driver_of(run, 4)
    rows = driver.resume(slides, cells_spec, trusted=["gone", "half", "new", "whole"])
    done = {row["slide_id"]: sorted(row["done_tiles"]) for row in rows}
    assert done == {"gone": [], "half": [0, 1, 3], "new": []}
    assert complete_slides(driver) == {"whole": [0, 1]}
    assert driver.progress.num_cells_before == driver.progress.num_cells == 4
    # Receipts that lacked a source are logged with it, once.
    driver._log()
    assert len(storage.list_files(f"{run.uri}/receipts")) == 8
    driver = driver_of(run, 4)
    again = driver.resume(slides, cells_spec)
    assert {row["slide_id"]: sorted(row["done_tiles"]) for row in again} == done
    driver._log()
    assert len(storage.list_files(f"{run.uri}/receipts")) == 8


def test_a_refused_driver_leaves_the_folder_as_it_is(tmp_path):
    (tmp_path / "slide.png").write_bytes(b"never opened")
    (tmp_path / "manifest.csv").write_text("slide_id,uri,mpp\na,slide.png,0.5\n")
    settings = {
        "manifest": str(tmp_path / "manifest.csv"),
        "encoder": "none",
        "precision": "float32",
    }
    config = extract.ExtractConfig(out=str(tmp_path / "run"), **settings)
    names = ("segmenter", "read_mpp", "core_px", "halo_px", "precision")
    identity = RunIdentity(
        networks=NetworkIdentity(encoder="none", embedding_dim=None),
        segmenter_version=extract.SEGMENTER_VERSIONS[config.segmenter],
        store_embeddings=False,
        **{name: getattr(config, name) for name in names},
    )
    run = begin_run(config.out, "extract", identity, {"of": "the first"})
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with hold_lease(run.uri), pytest.raises(LeaseError):
        extract.extract(config)
    after = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert after == before


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
class TestWithRay:
    """Through Ray Data, with real finishing."""

    def test_many_slides_make_few_files_of_the_log(self, run):
        size = 40
        for number in range(size):
            write_shard(run, f"s{number}.parquet", **{f"s{number}": [0, 1]})
        blocks = [
            pa.concat_tables(
                [receipts(f"s{n}", [t], 2, f"s{n}.parquet") for n in range(start, start + 8)]
            ).set_column(
                schemas.RECEIPTS.get_field_index("shard_row"), "shard_row", pa.array([t] * 8)
            )
            for start in range(0, size, 8)
            for t in (0, 1)
        ]
        driver = driver_of(run, size)
        driver.consume(ray.data.from_arrow([*blocks, blocks[0]]))
        driver.finish()
        assert len(driver.progress.records) == size
        assert driver.progress.records == run.records()
        assert {r["num_cells"] for r in driver.progress.records.values()} == {2}
        assert driver.progress.num_tiles == driver.progress.num_cells == 2 * size
        assert len(storage.list_files(f"{run.uri}/receipts")) <= 3

    def test_a_lost_lease_ends_a_run_that_waits_for_its_next_receipt(self, run, monkeypatch):
        monkeypatch.setattr(driver_module, "LOG_EVERY_S", (0.2, 0.2))
        asked = threading.Event()

        def check():
            asked.set()
            message = "somebody else has it"
            raise LeaseError(message)

        def slow(batch):
            time.sleep(1)
            return batch

        blocks = [receipts("a", [tile], 99) for tile in range(9)]
        dataset = ray.data.from_arrow(blocks).map_batches(slow, batch_format="pyarrow", num_cpus=2)
        with pytest.raises(LeaseError, match="somebody else"):
            driver_of(run, check=check).consume(dataset)
        assert asked.is_set()
        assert len(run.receipts()) == 0

    def test_a_run_to_which_nothing_comes_says_so(self, run, monkeypatch, caplog):
        monkeypatch.setattr(driver_module, "SILENT_S", 0.5)

        def slow(batch):
            time.sleep(2)
            return batch

        blocks = [receipts("a", [tile], 2, num_cells=0) for tile in range(2)]
        dataset = ray.data.from_arrow(blocks).map_batches(slow, batch_format="pyarrow", num_cpus=2)
        driver = driver_of(run)
        driver.consume(dataset)
        driver.finish()
        assert run.records()["a"]["status"] == "empty"
        messages = [r.message for r in caplog.records if "no tile was finished" in r.message]
        assert messages
        assert all("2 of 2 CPUs are left" in text for text in messages)

    def test_a_batch_of_slides_that_ends_the_process_is_taken_apart(self, run, monkeypatch):
        monkeypatch.setattr(driver_module, "RemoteFinisher", deadly_finisher())
        for name in ("a", "b", "c"):
            write_shard(run, f"{name}.parquet", **{name: [0]})
        table = pa.concat_tables([receipts(n, [0], 1, f"{n}.parquet") for n in ("a", "b", "c")])
        driver = take(driver_of(run, 3), table)
        driver.finish()
        records = driver.progress.records
        assert {name: record["status"] for name, record in records.items()} == {
            "a": "done",
            "b": "failed",
            "c": "done",
        }
        assert records["b"]["stage"] == "finish"
        assert set(run.records()) == {"a", "c"}
        # Unfinished slides keep their cells.
        left = storage.list_files(run.shards_uri)
        assert left == [run.shard_uri("b.parquet")]

    def test_a_partial_slide_keeps_its_shards_until_it_is_done(self, run, cells_spec, tmp_path):
        write_shard(run, "a.parquet", a=[0])
        failed = receipts("a", [1], 2, num_cells=0).to_pylist()[0] | {"error": "lost"}
        failed = pa.Table.from_pylist([failed], schema=schemas.RECEIPTS)
        driver = take(driver_of(run), receipts("a", [0], 2, "a.parquet"), failed)
        driver.finish()
        assert run.records()["a"]["status"] == "partial"
        assert storage.list_files(run.shards_uri) == [run.shard_uri("a.parquet")]
        driver = driver_of(run)
        (row,) = driver.resume(present_slides(tmp_path, "a"), cells_spec, trusted=["a"])
        assert row["done_tiles"] == [0]
        rest = with_source(receipts("a", [1], 2, num_cells=0), row["source"])
        take(driver, rest).finish()
        assert run.records()["a"]["status"] == "done"
        assert not storage.exists(run.shards_uri)

    def test_a_shard_stays_until_no_slide_needs_it(self, run, cells_spec, tmp_path):
        write_shard(run, "first.parquet", a=[0, 1], b=[0])
        write_shard(run, "second.parquet", b=[1], c=[0])
        write_shard(run, "orphan.parquet", c=[0])
        whole_a = receipts("a", [0, 1], 2, "first.parquet")
        run.log_receipts(at(receipts("b", [0], 2), "first.parquet", 2))
        run.log_receipts(at(receipts("b", [1], 2), "second.parquet", 0))
        run.log_receipts(at(receipts("c", [0], 2), "second.parquet", 1))
        driver = take(driver_of(run, 1), whole_a)
        names = ("a", "b", "c")
        slides = dict(zip(names, present_slides(tmp_path, *names), strict=True))
        # b and c have cells in the shard, and this run does not ask for them.
        driver.resume([slides["a"]], cells_spec)
        driver.finish()
        assert {r["status"] for r in run.records().values()} == {"done"}
        assert set(run.records()) == {"a"}
        names = {uri.rsplit("/", 1)[-1] for uri in storage.list_files(run.shards_uri)}
        assert names == {"first.parquet", "second.parquet", "orphan.parquet"}

        driver = driver_of(run, 1)
        assert driver.resume([slides["b"]], cells_spec, finished=["a"], trusted=["b"]) == []
        driver.finish()
        assert storage.read_table(run.cells_uri("b"))["slide_id"].to_pylist() == ["b", "b"]
        names = {uri.rsplit("/", 1)[-1] for uri in storage.list_files(run.shards_uri)}
        assert names == {"second.parquet", "orphan.parquet"}

        driver = driver_of(run, 1)
        (row,) = driver.resume([slides["c"]], cells_spec, finished=["a", "b"], trusted=["c"])
        assert row["done_tiles"] == [0]
        take(driver, with_source(receipts("c", [1], 2, num_cells=0), row["source"]))
        driver.finish()
        assert storage.read_table(run.cells_uri("c"))["slide_id"].to_pylist() == ["c"]
        # With the last slide goes what no receipt ever named.
        assert not storage.exists(run.shards_uri)


def deadly_finisher():
    """Return an actor that slide b ends."""

    class Deadly:
        def finish(self, run, receipts, imported):
            import os

            from scellst_ray.pipelines.finishing import finish_slides

            if "b" in receipts["slide_id"].to_pylist():
                os._exit(1)
            return finish_slides(run, receipts, imported=imported)

    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=1)(Deadly)


def test_shared_out_by_number_and_by_cells(run):
    driver = driver_of(RunFolder(run.uri, ""))
    driver.waiting.extend((f"s{n}", receipts(f"s{n}", [0], 1)) for n in range(10))
    assert len(driver._next_slides(4)) == 4
    driver.waiting.appendleft(("big", receipts("big", [0], 1, num_cells=1_000_000)))
    assert [s for s, _ in driver._next_slides(4)] == ["big"]
    driver.alone = {"s5"}
    assert [s for s, _ in driver._next_slides(4)] == ["s4"]
    assert [s for s, _ in driver._next_slides(4)] == ["s5"]
    assert [s for s, _ in driver._next_slides(9)] == ["s6", "s7", "s8", "s9"]
