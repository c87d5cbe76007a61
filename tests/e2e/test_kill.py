"""A driver killed in the middle of a run: the same command finishes it, doing only the rest."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from scellst_ray import storage
from scellst_ray.commands.cli import main
from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide
from tests.support.object_server import serving

pytestmark = [pytest.mark.ray, pytest.mark.e2e]


def extract_words(manifest, out):
    return [
        "extract",
        f"--manifest={manifest}",
        f"--out={out}",
        "--encoder=random:0:resnet18",
        "--core-px=128",
        "--tiles-per-task=2",
        "--memory-gb=0.5",
        "--workers=1",
        "--precision=float32",
    ]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Return a manifest and the server of its second slide, the smaller, which comes second.

    While the server holds that slide back no run can end, however fast the machine.
    """
    folder = tmp_path_factory.mktemp("cohort")
    for number, width_um in enumerate((500.0, 400.0)):
        config = SyntheticConfig(seed=number, width_um=width_um, height_um=300.0, num_genes=4)
        write_synthetic_slide(folder / f"s{number}", config)
    served = {"s1.tiff": (folder / "s1" / "slide.tiff").read_bytes()}
    with serving(served, patience_s=600.0) as (address, server):
        path = folder / "manifest.csv"
        path.write_text(f"slide_id,uri\ns0,s0/slide.tiff\ns1,{address}/s1.tiff\n")
        yield path, server


def started_run(manifest, server, out):
    """Start a run that cannot end; return its process as soon as some receipts are logged."""
    server.go_on.clear()
    server.half_sent.clear()
    process = subprocess.Popen(
        [sys.executable, "-m", "scellst_ray.commands.cli", *extract_words(manifest, out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A slide that another run has copied to its node is not asked for again.
        env=os.environ | {"SCELLST_RAY_CACHE_DIR": f"{out}-cache"},
    )
    held_since = None

    def some_logged():
        nonlocal held_since
        held_since = held_since or (server.half_sent.is_set() and time.monotonic())
        if held_since and time.monotonic() - held_since > 20:
            # On a busy machine Ray may plan the second slide first. The first then waits for it.
            server.go_on.set()
        return list(Path(out, "receipts").glob("*.parquet"))

    wait_until(some_logged, process)
    return process


def wait_until(condition, process):
    """Wait until a condition holds, while the run goes on."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "the run has not come so far within four minutes"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)


def shards_of(run):
    return set(storage.list_files(run.shards_uri))


def test_a_driver_that_gets_sigterm_logs_what_it_has(cohort, tmp_path):
    # What a preempted node, `ray job stop` and a batch system send first.
    manifest, server = cohort
    process = started_run(manifest, server, tmp_path / "ended")
    run = RunFolder(str(tmp_path / "ended"), "")
    before, shards = len(run.receipts()), shards_of(run)
    server.go_on.set()
    # The next shard comes, and with it a receipt, before the next file of the log is due.
    wait_until(lambda: shards_of(run) - shards, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    receipts = run.receipts()
    assert before < len(receipts)
    finished = run.records()
    for row in receipts.to_pylist():
        assert (
            row["slide_id"] in finished
            or not row["shard"]
            or Path(run.shard_uri(row["shard"])).exists()
        )
    assert not (tmp_path / "ended" / "lease.json").exists()


@pytest.mark.usefixtures("local_ray")
def test_sigkill_and_resume(cohort, tmp_path):
    manifest, server = cohort
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = started_run(manifest, server, killed)
    run = RunFolder(str(killed), "")
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.go_on.set()
    before = run.receipts()
    names = {row["shard"] for row in before.to_pylist() if row["shard"]}
    done = {(row["slide_id"], row["tile_id"]) for row in before.to_pylist()}
    assert main(extract_words(manifest, whole)) == 0
    total = len(RunFolder(str(whole), "").receipts())
    assert 0 < len(done) < total
    assert main(extract_words(manifest, killed)) == 0
    after = run.receipts().to_pylist()
    assert len(after) == total
    # Tiles with a receipt were not done again: theirs still name the first run's shards.
    kept = {(r["slide_id"], r["tile_id"]): r["shard"] for r in after}
    assert all(kept[key] in names or kept[key] is None for key in done)
    assert sum(shard in names for shard in kept.values() if shard) <= len(done)
    for slide_id in ("s0", "s1"):
        found = pq.read_table(run.cells_uri(slide_id))
        expected = pq.read_table(RunFolder(str(whole), "").cells_uri(slide_id))
        assert found.equals(expected)
        assert len(found) > 50
    assert not [p for p in Path(killed).rglob(".*") if p.is_file()]
    assert not (killed / "shards").exists()
