"""Every script of jobs/ by `ray job submit`, on two hosts, its input and output on S3.

One cohort goes the whole way: checked, planned, extracted with crops, an encoder pretrained, a head
cross-validated and trained, predicted, retried and exported.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

import scellst_ray
from scellst_ray import storage
from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide
from tests.faults import hosts as network_hosts
from tests.support.paths import ROOT
from tests.support.s3_server import BUCKET, serving_s3

pytestmark = [pytest.mark.ray, pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(2400)]
S3 = f"s3://{BUCKET}"
TILES = {"core_px": 320, "memory_gb": 0.5, "precision": "float32", "workers": 2}
ENCODER = "random:0:resnet18"
# Small slides have few counts.
FEW = {"min_gene_counts": 20, "min_spot_share": 0.0, "min_spot_counts": 1}
# In this order: some need what others leave.
JOBS = {
    "doctor": {"manifest": f"{S3}/spots.csv", "out": f"{S3}/cells", "encoder": ENCODER},
    "plan": {"manifest": f"{S3}/spots.csv", "encoder": ENCODER, "calibrate": 2, **TILES},
    "extract": {
        "manifest": f"{S3}/spots.csv",
        "out": f"{S3}/cells",
        "encoder": ENCODER,
        "crops": 64,
        **TILES,
    },
    "pretrain": {
        "crops": [f"{S3}/cells"],
        "out": f"{S3}/encoder",
        "arch": "resnet18",
        "epochs": 2,
        "warmup_epochs": 1,
        "batch": 16,
        "workers": 2,
        "cpus_per_worker": 1,
    },
    "crossvalidate": {
        "manifest": f"{S3}/spots.csv",
        "cells": f"{S3}/cells",
        "out": f"{S3}/folds",
        "panels": ["variable:4"],
        "max_epochs": 3,
        **FEW,
    },
    "train": {
        "manifest": f"{S3}/spots.csv",
        "cells": f"{S3}/cells",
        "out": f"{S3}/head",
        "genes": "variable:4",
        "max_epochs": 3,
        "workers": 2,
        "cpus_per_worker": 1,
        **FEW,
    },
    "predict": {"manifest": f"{S3}/new.csv", "out": f"{S3}/run", "head": f"{S3}/head", **TILES},
    "retry": {"run": f"{S3}/run"},
    "export": {"run": f"{S3}/run", "out": f"{S3}/cells.h5ad"},
    "demo": {"size_um": 500, "crops": 256},
}


def test_all_scripts_are_here():
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(JOBS)


@pytest.fixture(scope="module")
def hosts():
    """Yield two hosts, S3 in reach of them, with the cohort on it."""
    reason = network_hosts.why_not()
    if reason:
        pytest.skip(reason)
    with (
        network_hosts.Network() as network,
        serving_s3(host=network.gateway),
        network_hosts.Hosts(network, store_mib=200) as hosts,
    ):
        put_cohort(hosts.folder / "cohort")
        yield hosts


def put_cohort(folder):
    """Write three slides with spots to S3: two to learn from, one new."""
    rows = []
    for number in range(3):
        config = SyntheticConfig(seed=number, num_genes=8, width_um=520.0, height_um=420.0)
        name = f"s{number}"
        write_synthetic_slide(folder / name, config)
        uri = f"{S3}/{name}"
        rows.append(
            {
                "slide_id": name,
                "uri": f"{uri}/slide.tiff",
                "spots": f"{uri}/outs",
                "patient_id": name,
            }
        )
    for path in folder.rglob("*"):
        if path.is_file():
            put(path.read_bytes(), f"{S3}/{path.relative_to(folder)}")
    put(pl.DataFrame(rows[:2]).write_csv().encode(), f"{S3}/spots.csv")
    put(pl.DataFrame(rows[2:]).write_csv().encode(), f"{S3}/new.csv")


def put(content, uri):
    storage.publish(uri, lambda path: path.write_bytes(content))


def submit(hosts, job, settings):
    """Submit a job's script with this checkout, as jobs/README.md says; return what it printed."""
    folder = hosts.folder / "checkout"
    if not folder.exists():
        for name in ("jobs", "scellst_ray"):
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
    (folder / "jobs" / f"{job}.yaml").write_text(json.dumps(settings))
    words = [Path(sys.executable).with_name("ray"), "job", "submit", f"--address={hosts.api}"]
    words += ["--working-dir", folder, "--", sys.executable, f"jobs/{job}.py"]
    words += ["--config", f"jobs/{job}.yaml"]
    return subprocess.run(
        words, env=hosts.environment, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.parametrize("job", JOBS)
def test_the_job_ends_well(hosts, job):
    settings = JOBS[job] | ({"out": str(hosts.folder / "demo")} if job == "demo" else {})
    done = submit(hosts, job, settings)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout


def test_what_they_left_is_whole(hosts):
    del hosts
    run = scellst_ray.open_run(f"{S3}/run")
    assert run.slides["status"].to_list() == ["done"]
    assert len(run.genes) == 4
    assert run.slides["num_cells"][0] > 50
    for name in ("encoder/encoder.safetensors", "cells.h5ad"):
        assert storage.exists(f"{S3}/{name}"), name
    assert storage.list_files(f"{S3}/folds")
