"""`scellst-ray retry`: which slides are run again, and how they are configured."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from scellst_ray import storage
from scellst_ray.commands import retry as module
from scellst_ray.commands.configs import RetryConfig
from scellst_ray.commands.retry import retry, run_retry
from scellst_ray.stages.config import ExtractConfig, PredictConfig
from tests.support.run_folders import MISSING, make_run, record

RECORDS = [
    record("fine", "done"),
    record("bare", "empty"),
    record("part", "partial", num_failed_tiles=1),
    record("lost", "failed", num_tiles=0, num_failed_tiles=1, **MISSING),
]


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "m.csv"
    slides = ("fine", "bare", "part", "lost", "new")
    path.write_text("slide_id,uri\n" + "".join(f"{s},{s}.svs\n" for s in slides))
    return str(path)


@pytest.fixture
def started(monkeypatch):
    """Return the configurations that a job was started with; none runs."""
    configs = []

    def start(config, report):
        del report
        configs.append(config)
        return {"lost": RECORDS[3]}

    jobs = {job: (kind, start) for job, (kind, _) in module.JOBS.items()}
    monkeypatch.setattr(module, "JOBS", jobs)
    return configs


def run_of(tmp_path, config, job="extract", records=RECORDS):
    return make_run(tmp_path / "run", {}, records, config=asdict(config), job=job)


def test_the_stored_configuration_is_taken(tmp_path, manifest, started):
    stored = ExtractConfig(
        manifest=manifest, out="elsewhere", encoder="none", core_px=320, precision="bfloat16"
    )
    run = run_of(tmp_path, stored)
    retry(RetryConfig(run=run.uri))
    retry(RetryConfig(run=run.uri, memory_gb=7.5, max_attempts=9, manifest="other.csv"))
    same = asdict(stored) | {"out": run.uri, "slides": None}
    changed = same | {"memory_gb": 7.5, "max_attempts": 9, "manifest": "other.csv"}
    assert [asdict(config) for config in started] == [same, changed]


def test_failed_and_partial_ones_alone(tmp_path, manifest, started):
    run = run_of(tmp_path, ExtractConfig(manifest=manifest, out="o", slides=["new"]))
    assert retry(RetryConfig(run=run.uri, failed=True)) == {"lost": RECORDS[3]}
    assert started[0].slides == ["lost", "part"]


def test_chosen_slides(tmp_path, manifest, started):
    run = run_of(tmp_path, ExtractConfig(manifest=manifest, out="o"))
    retry(RetryConfig(run=run.uri, slides=["new", "part"]))
    assert started[0].slides == ["new", "part"]
    with pytest.raises(ValueError, match=r"slide\(s\) fine, bare are done"):
        retry(RetryConfig(run=run.uri, slides=["part", "fine", "bare"]))
    with pytest.raises(ValueError, match=r"such as 'prat'; did you mean 'part'"):
        retry(RetryConfig(run=run.uri, slides=["prat"]))
    with pytest.raises(ValueError, match="give one of them"):
        RetryConfig(run=run.uri, slides=["new"], failed=True)


def test_slides_that_left_the_manifest_are_named_and_left(tmp_path, manifest, started, caplog):
    gone = [record("gone", "failed", num_failed_tiles=1, **MISSING)]
    run = run_of(tmp_path, ExtractConfig(manifest=manifest, out="o"), records=RECORDS + gone)
    retry(RetryConfig(run=run.uri, failed=True))
    assert started[0].slides == ["lost", "part"]
    assert "stay as they are: gone" in caplog.text


def test_nothing_to_retry(tmp_path, manifest, started, capsys):
    run = run_of(tmp_path, ExtractConfig(manifest=manifest, out="o"), records=RECORDS[:2])
    assert run_retry(RetryConfig(run=run.uri, failed=True)) == 0
    assert started == []
    assert "0 slides" in capsys.readouterr().out


def test_predict_takes_the_head_that_the_run_has(tmp_path, manifest, started):
    stored = PredictConfig(manifest=manifest, out="o", head="heads/lost", encoder="random:0")
    run = run_of(tmp_path, stored, job="predict")
    retry(RetryConfig(run=run.uri))
    assert type(started[0]) is PredictConfig
    assert started[0].head == f"{run.uri}/head.safetensors"


def test_a_relative_folder(tmp_path, manifest, started, monkeypatch):
    run_of(tmp_path, ExtractConfig(manifest=manifest, out="o"))
    monkeypatch.chdir(tmp_path)
    retry(RetryConfig(run="run/"))
    assert Path(started[0].out) == tmp_path / "run"


def test_what_cannot_be_run_again(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run"):
        retry(RetryConfig(run=str(tmp_path)))
    run = make_run(tmp_path / "run", {}, RECORDS)
    with pytest.raises(ValueError, match=r"config\.yaml: holds nothing"):
        retry(RetryConfig(run=run.uri))
    storage.publish_text(f"{run.uri}/config.yaml", "manifest: m\nout: o\ncore: 3\n")
    with pytest.raises(ValueError, match=r"holds core; run `scellst-ray extract`"):
        retry(RetryConfig(run=run.uri))
    other = make_run(tmp_path / "other", {}, RECORDS, job="train")
    with pytest.raises(ValueError, match="a run of train; only runs of extract and predict"):
        retry(RetryConfig(run=other.uri))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"workers": "x"}, "workers is 'x', expected int"),
        ({"workers": True}, "workers is True, expected int"),
        ({"core_px": None}, "core_px is None, expected int"),
        ({"read_mpp": [0.5]}, r"read_mpp is \[0.5\], expected float"),
        ({"encoder": 5}, "encoder is 5, expected str"),
        ({"segmenter": "mine"}, "segmenter is 'mine', expected one of hematoxylin, "),
        ({"slides": "a,b"}, None),  # always those that the command chooses
        ({"workers": 0}, "workers is 0; it must be at least 1"),
        ({"manifest": None}, "manifest is None, expected str"),
    ],
)
def test_a_stored_configuration_that_was_edited(tmp_path, manifest, started, changes, problem):
    stored = ExtractConfig(manifest=manifest, out="elsewhere", encoder="none")
    run = run_of(tmp_path, stored)
    storage.publish_text(f"{run.uri}/config.yaml", yaml.safe_dump(asdict(stored) | changes))
    if problem is None:
        retry(RetryConfig(run=run.uri))
        assert len(started) == 1
        return
    for failed in (False, True):
        with pytest.raises(ValueError, match=rf"config\.yaml: {problem}.*; mend it, or run"):
            retry(RetryConfig(run=run.uri, failed=failed))
    assert started == []


def test_a_stored_configuration_without_a_manifest(tmp_path, started):
    run = run_of(tmp_path, ExtractConfig(manifest="m.csv", out="o", encoder="none"))
    storage.publish_text(f"{run.uri}/config.yaml", "encoder: none\n")
    with pytest.raises(ValueError, match=r"config\.yaml: has no manifest; mend it"):
        retry(RetryConfig(run=run.uri))
    assert started == []
