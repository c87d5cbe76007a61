from itertools import islice, permutations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.receipts_log import best_of_each_tile, read_log_file, read_log_files

COLUMNS = schemas.RECEIPTS.names


def receipt(tile_id, error=None, shard=None, **more):
    row = {"slide_id": "S", "tile_id": tile_id, "num_tiles": 9, "num_cells": 0, "error": error}
    return row | {"shard": shard} | more


def table_of(*rows):
    return pa.Table.from_pylist(list(rows), schema=schemas.RECEIPTS)


def tiles_of(log):
    return sorted(log.receipts["tile_id"].to_pylist())


@pytest.fixture
def run(tmp_path):
    """A run whose log has two files, one with tile 1 and one with tile 2."""
    run = RunFolder(str(tmp_path), "d1g")
    for tile_id in (1, 2):
        run.log_receipts(table_of(receipt(tile_id)))
    return run


def files(run):
    return storage.list_files(run.receipts_uri)


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    return content[:-60] + bytes([content[-60] ^ 16]) + content[-59:]


@pytest.mark.parametrize("damage", [cut, flip, lambda c: c[:0], lambda _: b"PAR1", bytes.upper])
def test_a_damaged_file_costs_only_its_own_receipts(run, caplog, damage):
    first, second = files(run)
    tile_id = read_log_file(second, ["tile_id"])["tile_id"].to_pylist()
    storage.publish_bytes(first, damage(storage.read_bytes(first)))
    for _ in range(2):
        log = read_log_files(run.receipts_uri, COLUMNS, "d1g")
        assert (tiles_of(log), log.unreadable) == (tile_id, (first,))
    (line,) = caplog.messages
    assert line.startswith(first)
    assert line.endswith("the tiles of its receipts are done again")


def replaced(table, name, column):
    return table.set_column(table.column_names.index(name), name, column)


SIGNED = schemas.conform(table_of(receipt(5)), schemas.RECEIPTS, "RECEIPTS", "d1g")
WRONG = {
    "of another run": schemas.conform(table_of(receipt(5)), schemas.RECEIPTS, "RECEIPTS", "x"),
    "another table": pa.table({"a": [1]}),
    "without a column": SIGNED.drop_columns("num_tiles"),
    "with a null": replaced(SIGNED, "tile_id", pa.array([None], pa.int64())),
    "of another type": replaced(SIGNED, "tile_id", pa.array(["five"])),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_of_the_right_name_and_another_content(run, caplog, kind):
    storage.publish_table(f"{run.receipts_uri}/20260301T120000000000-0f.parquet", WRONG[kind])
    assert run.receipts()["tile_id"].to_pylist() == [1, 2]
    (line,) = caplog.messages
    assert "20260301T120000000000-0f.parquet" in line


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "Thumbs.db",
        "20260301T120000000000-0f (conflicted copy).parquet",
        "20260301T120000000000-0f.parquet~",
        "20260301T120000000000-0f.parquet.bak",
    ],
)
def test_files_of_somebody_else_are_passed_over(run, caplog, name):
    storage.publish_bytes(f"{run.receipts_uri}/{name}", b"hello")
    storage.publish_bytes(f"{run.receipts_uri}/old/{name}", b"hello")
    assert run.receipts()["tile_id"].to_pylist() == [1, 2]
    assert caplog.messages == []


def test_columns_that_earlier_releases_lacked_are_null(tmp_path):
    old = schemas.conform(table_of(receipt(1)), schemas.RECEIPTS, "RECEIPTS", "d")
    path = tmp_path / "20260301T120000000000-0f.parquet"
    pq.write_table(old.drop_columns("waited_s"), path)
    assert read_log_file(str(path), COLUMNS, "d")["waited_s"].to_pylist() == [None]


def test_an_empty_log(tmp_path):
    log = read_log_files(str(tmp_path / "no"), ["slide_id", "shard"], "d")
    assert log.receipts.column_names == ["slide_id", "shard", "logged"]
    assert len(log.receipts) == 0


ROWS = [
    receipt(1, error="lost"),
    receipt(1, shard="a.parquet", shard_row=0, num_cells=3),
    receipt(1, error="late"),
    receipt(2, error="b"),
    receipt(2, error="a"),
    receipt(3, shard="y.parquet"),
    receipt(3, shard="x.parquet"),
]


def test_a_success_beats_an_error_in_any_order():
    found = set()
    for rows in islice(permutations(ROWS), 0, None, 41):
        best = best_of_each_tile(table_of(*rows)).sort_by("tile_id")
        found.add(tuple(map(str, best.select(["tile_id", "error", "shard"]).to_pylist())))
    kept = [(1, None, "a.parquet"), (2, "a", None), (3, None, "y.parquet")]
    names = ("tile_id", "error", "shard")
    assert found == {tuple(str(dict(zip(names, row, strict=True))) for row in kept)}


def test_the_order_of_receipts_stays():
    rows = [receipt(4), receipt(1, error="lost"), receipt(3), receipt(1, shard="s"), receipt(2)]
    assert best_of_each_tile(table_of(*rows))["tile_id"].to_pylist() == [4, 3, 1, 2]


def test_drivers_with_skewed_clocks(tmp_path):
    """The file of the success sorts first: its driver's clock was late."""
    run = RunFolder(str(tmp_path), "d1g")
    for stamp, row in (("2026", receipt(1, error="lost")), ("1999", receipt(1))):
        table = schemas.conform(table_of(row), schemas.RECEIPTS, "RECEIPTS", "d1g")
        storage.publish_table(f"{run.receipts_uri}/{stamp}0301T120000000000-0f.parquet", table)
    assert run.receipts()["error"].to_pylist() == [None]
    assert len(run.all_receipts()) == 2
    assert len(run.all_receipts(without=["S"])) == 0
