"""`sweep` removes the files that nothing reads, and nothing else."""

import shutil
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs import lease as lease_module
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.lease import LeaseError, hold_lease
from scellst_ray.runs.leftovers import (
    FINISHED_IMPORTED,
    FINISHED_SHARDS,
    NOTES,
    ORPHANS,
    TEMPORARY,
    sweep,
)
from scellst_ray.runs.receipts_log import best_of_each_tile
from tests.support.run_folders import here, make_run, receipt, record, write_lease

WRONG = {"stage": "embed", "error_type": "OSError", "error": "lost"}


def put(run, *parts, size=10):
    """Write a file of `size` bytes into a run folder."""
    path = Path(run.uri, *parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return str(path)


def every_file(run):
    return {str(path) for path in Path(run.uri).rglob("*") if path.is_file()}


@pytest.fixture
def littered(tmp_path):
    """Return a run with all leftovers that a crash may leave, and their paths by kind."""
    named = [
        receipt("half", 0, 9, 4, shard="a.parquet", shard_row=0),
        receipt("half", 1, 9, 4, shard="b.parquet", shard_row=0),
        receipt("half", 2, 9, 0),
    ]
    # Another driver did tile 1 again; tile 3 failed when it was done again, and its success counts.
    again = [
        receipt("half", 1, 9, 4, shard="c.parquet", shard_row=0),
        receipt("half", 3, 9, 4, shard="d.parquet", shard_row=0),
    ]
    failed = [receipt("half", 3, 9, 0, **WRONG)]
    records = [record("fine", "done"), record("part", "partial", num_failed_tiles=1)]
    sources = dict.fromkeys(("fine", "half", "part", "new"), 1)
    part = [receipt("part", 0, 2, 4, shard="p.parquet", shard_row=0)]
    # One shard belongs to a finished slide alone; it shares the second one with another slide.
    fine = [
        receipt("fine", t, 2, 4, shard=s, shard_row=0)
        for t, s in enumerate(("x.parquet", "c.parquet"))
    ]
    log = [(0, named), (1, again), (2, [*failed, *part, *fine])]
    run = make_run(tmp_path, sources, records, log, {})
    for name in ("a", "c", "d", "p"):
        put(run, "shards", f"{name}.parquet")
    for name in ("half", "new"):
        put(run, "imported", name, "0f.parquet")
    for name in ("cells/fine.parquet", "cells/half.parquet", "crops/set/fine.parquet"):
        put(run, name)
    # Files of other programs stay.
    for name in (
        ".nfs0000001",
        "cells/.DS_Store",
        "notes/.my.json.abcd1234abcd1234",
        ".git/x.parquet",
    ):
        put(run, name)
    goes = {
        ORPHANS: [put(run, "shards", f"{name}.parquet", size=100) for name in "ben"],
        FINISHED_SHARDS: [put(run, "shards", "x.parquet")],
        FINISHED_IMPORTED: [put(run, "imported", "fine", f"{name}.parquet") for name in "12"],
        TEMPORARY: [
            put(run, "shards", ".a.parquet.0123456789abcdef"),
            put(run, "cells", ".half.parquet.00000000deadbeef", size=1000),
            put(run, ".config.yaml.fedcba9876543210"),
            put(run, "crops", "set", "records", ".fine.json.0000000000000000"),
        ],
        NOTES: [put(run, "attempts", "s1", "w1.json"), put(run, "attempts", "s1", ".w2.json")],
    }
    return run, goes


def test_what_goes_and_what_stays(littered):
    run, goes = littered
    before = every_file(run)
    shown = sweep(run.uri, dry_run=True)
    assert (len(shown), sum(leftover.num_bytes for leftover in shown)) == (12, 1380)
    assert every_file(run) == before
    found = sweep(run.uri)
    for kind, paths in goes.items():
        assert {leftover.path for leftover in found if leftover.kind == kind} == set(paths)
    assert every_file(run) == before - set(chain(*goes.values()))
    assert not Path(run.uri, "imported", "fine").exists()
    assert not Path(run.uri, "attempts", "s1").exists()
    assert sweep(run.uri) == []


def test_refused_while_a_driver_works(littered):
    run, _ = littered
    before = every_file(run)
    with hold_lease(run.uri):
        for dry_run in (True, False):
            with pytest.raises(LeaseError, match=here()):
                sweep(run.uri, dry_run=dry_run)
    assert every_file(run) == before


def test_the_lease_of_a_dead_driver_is_no_hindrance_and_goes(littered):
    run, goes = littered
    now = datetime.now(UTC)
    write_lease(run, now - timedelta(hours=1), now, process="1")
    assert len(sweep(run.uri)) == sum(map(len, goes.values()))
    assert not Path(run.uri, "lease.json").exists()


def test_no_run_there(tmp_path):
    put(RunFolder(str(tmp_path), ""), "shards", "a", "b.parquet")
    with pytest.raises(FileNotFoundError, match="no run"):
        sweep(str(tmp_path))
    assert len(list(tmp_path.rglob("*"))) == 3


def test_a_log_that_cannot_be_read_keeps_the_shards_that_it_may_name(littered, caplog):
    run, _ = littered
    put(run, "receipts", "20260301T120009000000-0.parquet")
    before = every_file(run)
    found = sweep(run.uri)
    assert ORPHANS not in {leftover.kind for leftover in found}
    assert every_file(run) == before - {leftover.path for leftover in found}
    assert "120009000000-0" in caplog.text


def test_on_an_object_store(littered, monkeypatch):
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.0)
    run, goes = littered
    uri = f"memory://{Path(run.uri).name}/run"
    fs, path = storage.resolve(uri)
    fs.put(run.uri + "/", path, recursive=True)
    found = sweep(uri)
    assert len(found) == sum(map(len, goes.values()))
    left = {name.removeprefix(path) for name in fs.find(path)}
    gone = set(chain(*goes.values()))
    assert {f"{run.uri}{name}" for name in left} == every_file(run) - gone
    fs.rm(path, recursive=True)


def tile_cells(tile_id):
    """Return the cells of a tile, a pure function of it."""
    rng = np.random.default_rng(tile_id)
    count = int(rng.integers(0, 5))
    x, y = rng.uniform(0, 100, (2, count)).astype(np.float32)
    columns = {
        "slide_id": ["s"] * count,
        "cell_id": tile_id * 2**20 + np.arange(count),
        "x0": x,
        "y0": y,
        "area_um2": np.ones(count, np.float32),
        "nucleus_type": ["nucleus"] * count,
        "type_prob": pa.nulls(count, pa.float32()),
        "polygon": pa.array(list(shapely.to_wkb(shapely.buffer(shapely.points(x, y), 4)))),
        "seam": np.zeros(count, np.uint8),
    }
    return pa.table(columns, schema=pa.schema(schemas.SHARD_FIELDS))


def work(run, tiles, num_tiles, name, *, logged):
    """Do some tiles as a worker does; log their receipts if `logged`."""
    table = pa.concat_tables([tile_cells(tile) for tile in tiles])
    storage.publish_table(run.shard_uri(f"{name}.parquet"), table)
    rows, start = [], 0
    for tile in tiles:
        count = len(tile_cells(tile))
        shard = {"shard": f"{name}.parquet", "shard_row": start} if count else {}
        rows.append(receipt("s", tile, num_tiles, count, mpp=0.5, **shard))
        start += count
    receipts = pa.Table.from_pylist(rows, schema=schemas.RECEIPTS)
    if logged:
        run.log_receipts(receipts)
    return receipts


def finished(run):
    """Finish the slide from the log, as a driver does; return its table."""
    finish_slide(run, "s", best_of_each_tile(run.receipts()))
    return pq.read_table(run.cells_uri("s"))


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    num_tiles=st.integers(1, 12),
    turns=st.lists(
        st.tuples(st.integers(0, 11), st.integers(1, 4), st.booleans(), st.booleans()), max_size=8
    ),
)
def test_an_interrupted_run_swept_at_any_moment_ends_the_same(tmp_path_factory, num_tiles, turns):
    whole = make_run(tmp_path_factory.mktemp("whole"), {"s": 1})
    work(whole, range(num_tiles), num_tiles, "all", logged=True)
    expected = finished(whole)
    run = make_run(tmp_path_factory.mktemp("run"), {"s": 1})
    for number, (first, count, logged, swept) in enumerate(turns):
        tiles = [tile for tile in range(first, first + count) if tile < num_tiles]
        if tiles:
            work(run, tiles, num_tiles, f"turn-{number}", logged=logged)
        if swept:
            sweep(run.uri)
    sweep(run.uri)
    done = {row["tile_id"] for row in run.receipts().to_pylist()}
    # All logged shards still exist.
    there = {path.name for path in Path(run.shards_uri).glob("*")}
    named = {row["shard"] for row in run.receipts().to_pylist() if row["shard"]}
    assert there == named
    rest = [tile for tile in range(num_tiles) if tile not in done]
    if rest:
        work(run, rest, num_tiles, "rest", logged=True)
    if len(expected) == 0:
        return
    assert finished(run).equals(expected)
    shutil.rmtree(run.uri)
