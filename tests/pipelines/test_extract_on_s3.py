"""`extract` with its input and output on S3, a tenth of whose requests fail."""

import os
from pathlib import Path

import pytest
import ray

from scellst_ray import storage
from scellst_ray.pipelines.extract import extract
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.config import ExtractConfig
from tests.support.s3_server import BUCKET, serving_s3

pytestmark = pytest.mark.ray
SETTINGS = {
    "core_px": 96,
    "halo_px": 32,
    "encoder": "random:0:resnet18",
    "memory_gb": 0.5,
    "precision": "float32",
    "gpus": False,
    "workers": 2,
    "tiles_per_task": 4,
}


@pytest.fixture(scope="module")
def store():
    with serving_s3(share=0.1) as store:
        yield store


@pytest.fixture(scope="module")
def cluster(store, shared_ray):
    """Start Ray with the variables by which workers find S3."""
    names = [name for name in os.environ if name.startswith("AWS_")]
    assert os.environ["AWS_ENDPOINT_URL"] == store.address
    with shared_ray(**{name: os.environ[name] for name in names}) as cluster:
        yield cluster
    ray.shutdown()


def put_cohort(manifest, root):
    """Copy a manifest and its slides to S3."""
    for line in ["manifest.csv", *(row.split(",")[1] for row in manifest.read_text().split()[1:])]:
        content = (manifest.parent / line).read_bytes()
        storage.publish(f"{root}/{line}", lambda path, content=content: path.write_bytes(content))


@pytest.mark.usefixtures("cluster")
def test_the_tables_are_those_of_a_local_run(store, small_cohort, tmp_path):
    root = f"s3://{BUCKET}"
    put_cohort(small_cohort, f"{root}/input")
    runs = {}
    for name, manifest, out in (
        ("local", str(small_cohort), str(tmp_path / "run")),
        ("s3", f"{root}/input/manifest.csv", f"{root}/run"),
    ):
        before = len(store.failed)
        records = extract(ExtractConfig(manifest=manifest, out=out, **SETTINGS))
        assert {record["status"] for record in records.values()} == {"done"}
        runs[name] = (RunFolder(out, ""), records)
        assert (len(store.failed) > before) is (name == "s3")
    (local, records), (remote, remote_records) = runs.values()
    store.share = 0.0
    for slide_id, record in records.items():
        found = storage.read_table(remote.cells_uri(slide_id))
        assert found.equals(storage.read_table(local.cells_uri(slide_id)))
        assert len(found) > 20
        for key in ("num_cells", "num_tiles", "num_tiles_done", "mpp"):
            assert remote_records[slide_id].get(key) == record.get(key), key
    assert len(store.failed) >= 10
    assert set(store.failed) == set(store.kinds)
    # The same files, and no half-uploaded ones.
    remote = {uri.removeprefix(f"{root}/run/") for uri in files_below(f"{root}/run")}
    here = {str(p.relative_to(local.uri)) for p in Path(local.uri).rglob("*") if p.is_file()}
    assert plain_names(remote) == plain_names(here)


def files_below(uri):
    fs, path = storage.resolve(uri)
    return [f"s3://{name}" for name in fs.find(path)]


def plain_names(names):
    """Leave out the parts of names that are random or a time."""
    return {name for name in names if not name.startswith(("receipts/", "attempts/", "."))}


@pytest.mark.usefixtures("cluster")
def test_no_credentials_are_in_the_run(store):
    texts = [storage.read_bytes(uri) for uri in files_below(f"s3://{BUCKET}/run")]
    assert len(texts) > 5
    secrets = [os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    assert not any(secret.encode() in text for secret in secrets for text in texts)
    assert store.address
