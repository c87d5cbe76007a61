"""A run that is interrupted, looked at, swept and retried ends as an undisturbed one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scellst_ray import storage
from scellst_ray.commands.configs import RetryConfig
from scellst_ray.commands.retry import retry
from scellst_ray.commands.status import status_of
from scellst_ray.pipelines.extract import extract
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.lease import LeaseError
from scellst_ray.runs.leftovers import NOTES, ORPHANS, TEMPORARY, sweep
from scellst_ray.runs.state import read_state
from scellst_ray.stages.config import ExtractConfig
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.write import WriteShards

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
SETTINGS = {"core_px": 96, "encoder": "none", "memory_gb": 0.5, "tiles_per_task": 2, "gpus": False}


class Killed(Exception):  # noqa: N818
    """Stands for whatever ends a driver."""


def tables(run):
    return {name: pq.read_table(run.cells_uri(name)) for name in ("s0", "s1")}


@pytest.fixture
def plain(manifest, tmp_path, helpers, cells_spec):
    """Return the CELLS of both slides from a plain loop over their tiles."""
    run = RunFolder(str(tmp_path / "plain"), "plain")
    spec = replace(cells_spec, core_px=96, encoder="none", store_embeddings=False)
    segment, write = helpers.find_stage(spec), WriteShards(run)
    for name in ("s0", "s1"):
        uri = manifest.parent / name / "slide.tiff"
        tiles = plan_slide(helpers.slide_row(uri, slide_id=name), spec)
        receipts = [write(segment([tile])) for tile in tiles]
        finish_slide(run, name, pa.concat_tables(receipts))
    return tables(run)


@pytest.fixture
def manifest(small_cohort, tmp_path):
    """Return a manifest of the two slides and a third that is cut off."""
    lines = ["slide_id,uri"]
    for name in ("s0", "s1"):
        shutil.copytree(small_cohort.parent / name, tmp_path / name)
        lines.append(f"{name},{name}/slide.tiff")
    (tmp_path / "s2.tiff").write_bytes((tmp_path / "s0" / "slide.tiff").read_bytes()[:5000])
    (tmp_path / "m.csv").write_text("\n".join([*lines, "s2,s2.tiff"]) + "\n")
    return tmp_path / "m.csv"


def interrupt(manifest, out):
    """Run `extract` until some tiles are done; return its state, read from the folder."""
    seen = []

    def report(progress):
        if progress.num_tiles >= 4:
            seen.append(read_state(str(out)))
            with pytest.raises(LeaseError):
                sweep(str(out))
            raise Killed

    with pytest.raises(Killed):
        extract(ExtractConfig(manifest=str(manifest), out=str(out), **SETTINGS), report)
    return seen[-1]


def litter(run):
    """Leave what crashes leave."""
    for shard in list(Path(run.uri, "shards").rglob("*.parquet")):
        shutil.copy(shard, shard.with_name(f"copy-{shard.name}"))
        shutil.copy(shard, shard.with_name(f".{shard.name}.0123456789abcdef"))
    Path(run.uri, "attempts", "old").mkdir(parents=True, exist_ok=True)
    Path(run.uri, "attempts", "old", "w.json").write_text("{}")


def test_interrupted_looked_at_swept_and_retried(manifest, plain, tmp_path):
    run = RunFolder(str(tmp_path / "run"), "")
    seen = interrupt(manifest, run.uri)
    assert seen.holder.state == "alive"
    json.dumps(status_of(seen))
    left = read_state(run.uri)
    assert left.holder.state == "none"
    assert left.slides["tiles_done"].sum() >= 4
    assert left.counts()["done"] < 2
    assert not Path(run.uri, "summary.json").exists()

    named = {row["shard"] for row in run.receipts().to_pylist() if row["shard"]}
    litter(run)
    found = sweep(run.uri)
    assert {ORPHANS, TEMPORARY, NOTES} <= {leftover.kind for leftover in found}
    assert not {leftover.path.rsplit("/", 1)[-1] for leftover in found} & named
    assert {p.name for p in Path(run.uri, "shards").rglob("*.parquet")} <= named

    records = retry(RetryConfig(run=run.uri))
    assert [records[name]["status"] for name in ("s0", "s1", "s2")] == ["done", "done", "failed"]
    for name, expected in plain.items():
        assert tables(run)[name].equals(expected)
    # What was done was not done again.
    assert {row["shard"] for row in run.receipts().to_pylist()} >= named
    summary = storage.read_json(f"{run.uri}/summary.json")
    assert (summary["slides"]["done"], summary["slides"]["failed"]) == (2, 1)
    assert summary["num_cells"] == sum(map(len, plain.values()))
    assert summary["seconds"]["segment"] > 0
    assert summary["config"]["core_px"] == 96
    assert summary["failures"][0]["example"]["slide_id"] == "s2"
    assert "| 1 | 0 | plan | s2 |" in Path(run.uri, "SUMMARY.md").read_text()

    # The damaged slide is repaired, so s0 has another file; the rest is not touched.
    shutil.copy(tmp_path / "s0" / "slide.tiff", tmp_path / "s2.tiff")
    before = {path: path.stat().st_mtime_ns for path in Path(run.uri, "cells").iterdir()}
    only = retry(RetryConfig(run=run.uri, failed=True))
    assert {name: record["status"] for name, record in only.items()} == {"s2": "done"}
    after = {path: path.stat().st_mtime_ns for path in Path(run.uri, "cells").iterdir()}
    assert {path: after[path] for path in before} == before
    ids = ["cell_id", "x0", "y0"]
    assert pq.read_table(run.cells_uri("s2")).select(ids).equals(plain["s0"].select(ids))
    assert storage.read_json(f"{run.uri}/summary.json")["slides"]["done"] == 3
    assert sweep(run.uri) == []
