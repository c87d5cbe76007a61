"""A driver killed in the middle of a run: the same command finishes it, doing only the rest."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide
from tests.support.object_server import serving

pytestmark = [pytest.mark.ray, pytest.mark.e2e]


def extract_command(manifest, out):
    return [
        sys.executable,
        "-m",
        "scellst_ray.commands.cli",
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
    process = subprocess.Popen(
        extract_command(manifest, out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not list(Path(out, "receipts").glob("*.parquet")):
        assert time.monotonic() < deadline, "no receipt within four minutes"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    return process


def test_a_driver_told_to_end_logs_what_it_has(cohort, tmp_path):
    # What a preempted node, `ray job stop` and a batch system send first.
    process = started_run(*cohort, tmp_path / "told")
    run = RunFolder(str(tmp_path / "told"), "")
    before = len(run.receipts())
    time.sleep(3)  # less than until the next file of the log
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    receipts = run.receipts()
    assert before < len(receipts)
    for row in receipts.to_pylist():
        assert not row["shard"] or Path(run.shard_uri(row["shard"])).exists()
    assert not (tmp_path / "told" / "lease.json").exists()


def test_sigkill_and_resume(cohort, tmp_path):
    manifest, server = cohort
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    server.go_on.set()
    subprocess.run(extract_command(manifest, whole), check=True, capture_output=True, timeout=300)
    process = started_run(manifest, server, killed)
    run = RunFolder(str(killed), "")
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.go_on.set()
    before = run.receipts()
    names = {row["shard"] for row in before.to_pylist() if row["shard"]}
    done = {(row["slide_id"], row["tile_id"]) for row in before.to_pylist()}
    total = len(RunFolder(str(whole), "").receipts())
    assert 0 < len(done) < total
    again = subprocess.run(
        extract_command(manifest, killed), capture_output=True, timeout=300, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
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
