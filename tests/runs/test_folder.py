import pyarrow as pa
import pytest
import yaml

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.folder import (
    RunFolder,
    begin_run,
    open_embedded_run,
)
from tests.support.run_folders import Settings

IDENTITY = Settings({"encoder": "random:0", "read_mpp": 0.5, "shape": (1, 2)})


def receipts(rows):
    """Return RECEIPTS from (slide_id, tile_id, num_cells, error)."""
    full = [
        {"slide_id": s, "tile_id": t, "num_tiles": 9, "num_cells": n, "error": error}
        for s, t, n, error in rows
    ]
    return pa.Table.from_pylist(full, schema=schemas.RECEIPTS)


@pytest.fixture
def run(tmp_path):
    return begin_run(str(tmp_path / "run"), "extract", IDENTITY, {"core_px": 960})


def test_open_and_reopen(tmp_path, run):
    again = begin_run(f"{tmp_path}/run/", "extract", IDENTITY, {"core_px": 480, "workers": 2})
    assert again == run
    stored = storage.read_json(f"{run.uri}/run.json")
    assert stored["digest"] == run.digest
    assert stored["identity"]["encoder"] == "random:0"
    # The configuration is for people and no part of the identity.
    with open(f"{run.uri}/config.yaml", encoding="utf-8") as handle:  # noqa: PTH123
        assert yaml.safe_load(handle) == {"core_px": 480, "workers": 2}


def test_the_digest_does_not_depend_on_key_order(tmp_path, run):
    turned = Settings(reversed(IDENTITY.items()))
    assert begin_run(str(tmp_path / "other"), "extract", turned, {}).digest == run.digest
    assert begin_run(str(tmp_path / "third"), "predict", turned, {}).digest != run.digest


def test_a_relative_folder_means_the_same_everywhere(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert begin_run("run", "extract", IDENTITY, {}) == run


def test_a_run_on_an_object_store(tmp_path):
    uri = f"memory://{tmp_path.name}/run"
    run = begin_run(uri, "extract", IDENTITY, {})
    assert begin_run(uri, "extract", IDENTITY, {}) == run
    run.log_receipts(receipts([("a", 0, 1, None)]))
    assert len(run.receipts()) == 1
    storage.remove_tree(f"memory://{tmp_path.name}")


@pytest.mark.parametrize(
    ("job", "identity", "match"),
    [
        ("extract", IDENTITY | {"read_mpp": 0.25}, r"read_mpp: 0.5 in the folder, 0.25 now"),
        ("predict", IDENTITY, r"job: 'extract' in the folder, 'predict' now"),
        ("extract", IDENTITY | {"head": "h"}, r"head: None in the folder, 'h' now"),
        ("extract", {"encoder": "random:0"}, r"read_mpp: 0.5 in the folder, None now, shape"),
    ],
)
def test_another_run_is_refused_with_what_differs(run, job, identity, match):
    with pytest.raises(ValueError, match=match) as caught:
        begin_run(run.uri, job, Settings(identity), {})
    assert run.uri in str(caught.value)
    assert "encoder" not in str(caught.value)
    assert "another --out" in str(caught.value)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"files that are no run.*empty folder"):
        begin_run(str(tmp_path), "extract", IDENTITY, {})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert begin_run(str(tmp_path / "empty"), "extract", IDENTITY, {})


def test_a_run_with_embeddings_is_distinguished_from_other_folders(tmp_path):
    uri = str(tmp_path)
    with pytest.raises(ValueError, match=r"holds no run of scellst_ray; run `scellst-ray extract`"):
        open_embedded_run(uri)
    info = {"digest": "d", "identity": {}}
    storage.publish_json(f"{uri}/run.json", info)
    with pytest.raises(ValueError, match="its cells have no embeddings"):
        open_embedded_run(uri)
    storage.publish_json(f"{uri}/run.json", info | {"identity": {"store_embeddings": True}})
    run, found = open_embedded_run(uri)
    assert run == RunFolder(uri, "d")
    assert found["identity"] == {"store_embeddings": True}


def test_the_last_receipt_of_a_tile_wins(run):
    assert run.receipts().schema.names == schemas.RECEIPTS.names
    assert len(run.receipts()) == 0
    run.log_receipts(receipts([("a", 0, 5, None), ("a", 1, 0, "lost"), ("b", 0, 7, None)]))
    run.log_receipts(receipts([("a", 1, 0, "lost again"), ("a", -1, 0, "no file")]))
    run.log_receipts(receipts([("a", 1, 6, None)]))
    rows = {(r["slide_id"], r["tile_id"]): r for r in run.receipts().to_pylist()}
    assert {key: (row["num_cells"], row["error"]) for key, row in rows.items()} == {
        ("a", 0): (5, None),
        ("a", 1): (6, None),
        ("b", 0): (7, None),
        ("a", -1): (0, "no file"),
    }


def test_receipts_are_signed_and_checked(run):
    run.log_receipts(receipts([("a", 0, 5, None)]))
    (uri,) = storage.list_files(f"{run.uri}/receipts")
    schema = storage.read_schema(uri)
    schemas.check(schema, "RECEIPTS", uri)
    assert schema.metadata[b"scellst_ray.run_digest"].decode() == run.digest
    with pytest.raises(ValueError, match="num_cells"):
        run.log_receipts(receipts([("a", 0, 5, None)]).drop_columns("num_cells"))


def test_records(run):
    assert run.records() == {}
    for slide_id in ("a", "b.c"):
        storage.publish_json(run.record_uri(slide_id), {"slide_id": slide_id, "status": "done"})
    assert run.records()["b.c"] == {"slide_id": "b.c", "status": "done"}
    assert list(run.records()) == ["a", "b.c"]


def test_paths():
    run = RunFolder("s3://b/run", "d")
    assert run.cells_uri("a") == "s3://b/run/cells/a.parquet"
    assert run.expression_uri("a") == "s3://b/run/expression/a.parquet"
    assert run.failures_uri("a") == "s3://b/run/failures/a.parquet"
    assert run.shard_uri("x.parquet") == "s3://b/run/shards/x.parquet"
    assert run.imported_uri("a") == "s3://b/run/imported/a"


def test_a_log_of_an_earlier_release_is_read(run):
    rows = receipts([("a", 0, 5, None), ("a", 1, 6, None)])
    old = rows.slice(0, 1).drop_columns(["waited_s", "source"])
    storage.publish_table(f"{run.uri}/receipts/20240101T000000000000-0.parquet", old)
    run.log_receipts(rows.slice(1))
    found = run.receipts()
    assert found["tile_id"].to_pylist() == [0, 1]
    assert found["waited_s"].null_count == found["source"].null_count == 2
    assert found.schema.equals(schemas.RECEIPTS)


@pytest.mark.parametrize("key", ["encoder", "init"])
def test_a_run_that_knew_its_weights_by_name_goes_on(tmp_path, caplog, key):
    uri = str(tmp_path / "run")
    old = begin_run(uri, "extract", Settings({key: "timm:vit.a", "core_px": 5}))
    content = (tmp_path / "run/run.json").read_text()
    now = Settings({key: "timm:vit.a:sha256:00", "core_px": 5})
    again = begin_run(uri, "extract", now)
    assert again.digest == old.digest
    assert (tmp_path / "run/run.json").read_text() == content
    assert [r.message for r in caplog.records if "by their name alone" in r.message]
    for other in ({key: "timm:vit.b:sha256:00"}, {"core_px": 6}, {"new": 1}):
        with pytest.raises(ValueError, match="holds another run"):
            begin_run(uri, "extract", Settings(now | other))
    new = begin_run(str(tmp_path / "new"), "extract", now)
    with pytest.raises(ValueError, match="holds another run"):
        begin_run(new.uri, "extract", Settings(now | {key: "timm:vit.a:sha256:01"}))
