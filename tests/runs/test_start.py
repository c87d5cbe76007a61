"""Several drivers start on one new folder: one of them works, and the folder is its run."""

import json
import subprocess
import sys
import threading
import time

import pytest

from scellst_ray import storage
from scellst_ray.runs.folder import read_run_info
from scellst_ray.runs.lease import LeaseError
from scellst_ray.runs.start import hold_run
from tests.support.run_folders import Settings

START = """
import sys, time
from pathlib import Path
from scellst_ray.runs.start import hold_run
from tests.support.run_folders import Settings
folder, name = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
while not (folder / "go").exists():
    time.sleep(0.0005)
try:
    with hold_run(str(folder / "run"), "extract", Settings({"segmenter": name})) as (run, lease):
        print("works", run.digest, flush=True)
        sys.stdin.read()
except ValueError as error:
    print("refused", error, flush=True)
"""


def digest_in(folder):
    return json.loads((folder / "run.json").read_text())["digest"]


def test_threads_that_look_at_the_same_moment(tmp_path, monkeypatch):
    barrier, real = threading.Barrier(2), storage.exists

    def exists(uri):
        found = real(uri)
        if uri.endswith("run.json"):
            try:
                barrier.wait(0.3)  # both have looked before either writes, if both may look
            except threading.BrokenBarrierError:
                barrier.reset()
        return found

    monkeypatch.setattr(storage, "exists", exists)
    for number in range(3):
        out, outcome, ended = tmp_path / str(number), {}, threading.Event()

        def start(name, out=out, outcome=outcome, ended=ended):
            try:
                with hold_run(str(out), "extract", Settings({"segmenter": name})) as (run, _):
                    outcome[name] = run.digest
                    ended.wait(5)
            except (LeaseError, ValueError) as error:
                outcome[name] = error
                ended.set()

        threads = [threading.Thread(target=start, args=(s,)) for s in ("hematoxylin", "imported")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        works = [value for value in outcome.values() if isinstance(value, str)]
        assert works == [digest_in(out)]
        assert sorted(path.name for path in out.iterdir()) == ["run.json"]


def test_processes_that_start_together(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("hematoxylin", "imported", "cellvit")
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    (tmp_path / "go").touch()
    said = [process.stdout.readline().split() for process in processes]
    outcomes = sorted(words[0] for words in said)
    works = [words[1] for words in said if words[0] == "works"]
    assert (outcomes, works) == (["refused", "refused", "works"], [digest_in(tmp_path / "run")])
    for process in processes:
        process.communicate()


def test_a_refused_command_leaves_no_trace(tmp_path):
    with hold_run(str(tmp_path / "run"), "extract", Settings({"core_px": 960})):
        pass
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    time.sleep(0.01)
    with (
        pytest.raises(ValueError, match="core_px: 960 in the folder, 480 now"),
        hold_run(str(tmp_path / "run"), "extract", Settings({"core_px": 480})),
    ):
        pass
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with (
        pytest.raises(ValueError, match="files that are no run"),
        hold_run(str(tmp_path / "mine"), "extract", Settings()),
    ):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_lease_of_a_driver_that_died_early_is_no_other_file(tmp_path):
    (tmp_path / "lease.json").write_text("{")  # it was killed while it wrote
    with hold_run(str(tmp_path), "extract", Settings()) as (run, lease):
        lease.check()
        assert run.digest == digest_in(tmp_path)


def test_on_an_object_store_the_last_to_write_counts(tmp_path, monkeypatch):
    uri, real = f"memory://{tmp_path.name}/run", storage.publish_json
    other = {"digest": "0" * 16, "identity": {"segmenter": "imported"}}

    def publish_json(where, value):
        real(where, value)
        if where.endswith("run.json"):
            real(where, other)  # the other driver held the lease, too

    monkeypatch.setattr(storage, "publish_json", publish_json)
    monkeypatch.setattr("scellst_ray.runs.lease.SETTLE_S", 0.01)
    with (
        pytest.raises(ValueError, match="holds another run"),
        hold_run(uri, "extract", Settings({"segmenter": "hematoxylin"})),
    ):
        pass
    storage.remove_tree(f"memory://{tmp_path.name}")


def test_a_run_goes_on_with_the_libraries_that_it_was_begun_with(tmp_path):
    uri, then = str(tmp_path / "run"), {"OpenCV": "4.10", "OpenSlide": "4.0"}
    with hold_run(uri, "extract", Settings(), then):
        pass
    assert storage.read_json(f"{uri}/run.json")["libraries"] == then
    with hold_run(uri, "extract", Settings(), then):
        pass
    for name, version in (("OpenCV", "5.0"), ("OpenSlide", "4.1")):
        with (
            pytest.raises(ValueError, match=f"begun with {name} {then[name]}, and here is") as why,
            hold_run(uri, "extract", Settings(), then | {name: version}),
        ):
            pass
        assert version in str(why.value)
        assert "Install the versions of then, or give another --out" in str(why.value)
    assert storage.read_json(f"{uri}/run.json")["libraries"] == then


def test_what_an_earlier_release_did_not_note_is_told_once(tmp_path, caplog):
    uri, now = str(tmp_path / "run"), {"OpenCV": "5.0"}
    with hold_run(uri, "extract", Settings()) as (run, _):
        pass
    before = read_run_info(f"{uri}/run.json")
    for _ in range(2):
        with hold_run(uri, "extract", Settings(), now) as (again, _):
            assert again == run
    assert read_run_info(f"{uri}/run.json") == before | {"libraries": now}
    assert caplog.text.count("begun by an earlier release, which noted neither versions") == 1
