"""A cohort in which nine of ten slides are broken ends, and says of each what became of it.

The command runs in folders of its own for everything it might write to: the working folder, the
home and the temporary folder. Its processes are watched from outside.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scellst_ray.pipelines.metrics import STATUSES
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.reading import open_run
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.tiles import CellsSpec
from scellst_ray.stages.write import WriteShards
from tests.faults.mutants import KINDS, MUTATORS, sources, write_cohort

pytestmark = [pytest.mark.ray, pytest.mark.e2e]
MARK = "SCELLST_RAY_TEST_OF_MUTANTS"
SPEC = CellsSpec(
    segmenter="hematoxylin",
    read_mpp=None,
    core_px=192,
    halo_px=32,
    encoder="none",
    precision="float32",
    head_uri=None,
    store_embeddings=False,
)
WORKER_GIB = 0.5
# What a worker may have: with nothing open, and by its limit twice what it declares and 2 GiB.
START_GIB = 1.0
WORKER_MOST_GIB = START_GIB + 2 * WORKER_GIB + 2
# Two workers, and one process that plans: it declares nothing, so it may have as much as one of
# 2 GiB. The others (driver, Ray's own) are no larger than workers are in the beginning.
ALL_MOST_GIB = 2 * WORKER_MOST_GIB + START_GIB + 6

BEGUN = {"torchinductor", "scellst_ray_cache"}
FOLDERS = {"cwd", "home", "loop", "printed.txt", "run", "slides", "tmp"}


class Watch(threading.Thread):
    """A thread that looks at all processes of a command twice a second, until `ended` is set."""

    def __init__(self, pid):
        super().__init__()
        self.command, self.ended = psutil.Process(pid), threading.Event()
        self.peak_gib, self.most_gib, self.cpu_s = collections.Counter(), 0.0, {}
        self.workers = set()

    def run(self):
        while not self.ended.wait(0.5):
            rss = 0
            for process in [self.command, *self.command.children(recursive=True)]:
                try:
                    rss += self._look(process)
                except (psutil.Error, ProcessLookupError, FileNotFoundError):
                    continue  # it has ended
            self.most_gib = max(self.most_gib, rss / 2**30)

    def _look(self, process):
        key = (process.pid, process.create_time())
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        if not found:
            return 0
        name = " ".join(process.cmdline()[:1]).split("(")[0]
        if name.startswith("ray::") and ("Map" in name or "Stages" in name or "Plan" in name):
            self.workers.add(key)
        self.peak_gib[key] = max(self.peak_gib[key], int(found[1]) / 2**20)
        self.cpu_s[key] = sum(process.cpu_times()[:2])
        return process.memory_info().rss

    def stop(self):
        self.ended.set()
        self.join()


def tree(folder):
    """Return every path below a folder with its size, times and kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def processes_of(mark):
    """Return the processes that have a marked environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def run_extract(folder, timeout_s):
    """Run the command on folder/slides; return what it printed, and the watch over it."""
    ray_folder = tempfile.mkdtemp(prefix="ray")  # short: sockets lie in it
    homes = {name: folder / name for name in ("home", "tmp", "cwd")}
    for home in homes.values():
        home.mkdir()
    environment = os.environ | {
        "HOME": str(homes["home"]),
        "TMPDIR": str(homes["tmp"]),
        "RAY_TMPDIR": ray_folder,
        "RAY_DEDUP_LOGS": "0",
        MARK: str(folder),
    }
    for name in ("RAY_ADDRESS", "SCELLST_RAY_CACHE_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        environment.pop(name, None)
    words = [
        *(f"--manifest={folder / 'slides' / 'manifest.csv'}", f"--out={folder / 'run'}"),
        *("--encoder=none", f"--core-px={SPEC.core_px}", f"--halo-px={SPEC.halo_px}"),
        *("--workers=2", f"--memory-gb={WORKER_GIB}", "--gpus=false"),
        *("--tile-timeout-s=60", "--plan-timeout-s=120", "--max-attempts=2"),
    ]
    printed = folder / "printed.txt"
    try:
        with printed.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "scellst_ray.commands.cli", "extract", *words],
                env=environment,
                cwd=homes["cwd"],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            watch = Watch(process.pid)
            watch.start()
            try:
                code = process.wait(timeout_s)
            finally:
                watch.stop()
                process.kill()
        # Slides failed, and not the run.
        assert code == 1
        assert "run the same command again" in printed.read_text(), printed.read_text()[-3000:]
        until = time.monotonic() + 20
        while processes_of(str(folder)) and time.monotonic() < until:
            time.sleep(0.2)
        assert processes_of(str(folder)) == []
    finally:
        for left in processes_of(str(folder)):
            left.kill()
        shutil.rmtree(ray_folder, ignore_errors=True)
    return printed.read_text(), watch


def cells_of_intact(folder, helpers):
    """Return the CELLS of each source by a plain loop, without slide ids."""
    run, found = RunFolder(str(folder / "plain"), ""), {}
    for source in sources(folder):
        path = folder / f"{source.name}.{source.suffix}"
        path.write_bytes(source.content)
        row = helpers.slide_row(path, slide_id=source.name, mpp=source.mpp)
        segment, write = helpers.find_stage(SPEC), WriteShards(run)
        receipts = [write(segment([tile])) for tile in plan_slide(row, SPEC)]
        record = finish_slide(run, source.name, pa.concat_tables(receipts))
        assert record["status"] == "done"
        assert record["num_tiles"] >= 4
        found[source.name] = pq.read_table(run.cells_uri(source.name)).drop_columns("slide_id")
        assert len(found[source.name]) > 20
    return found


def check_run(folder, made, cells):
    """Check what the run says of each slide; return its records."""
    records = RunFolder(str(folder / "run"), "").records()
    assert sorted(records) == sorted(slide.slide_id for slide in made)
    for slide in made:
        record = records[slide.slide_id]
        assert record["status"] in STATUSES
        if slide.kind == "intact":
            assert record["status"] == "done"
            path = RunFolder(str(folder / "run"), "").cells_uri(slide.slide_id)
            found = pq.read_table(path).drop_columns("slide_id")
            assert found.equals(cells[slide.source]), slide
        if record["status"] in ("failed", "partial"):
            for name in ("stage", "error_type", "error"):
                assert record[name], (slide, record)
        if record["status"] == "failed":
            # It names the slide, by its file or its id.
            assert slide.slide_id in record["error"], (slide, record)
    # Readers take the run as any other.
    assert open_run(str(folder / "run")).slides["status"].len() == len(made)
    return records


def report(made, records, printed, watch, wall_s):
    """Print what became of the slides, for people: pytest -s."""
    kinds = {slide.slide_id: slide.kind for slide in made}
    by_kind = collections.Counter((kinds[s], r["status"]) for s, r in records.items())
    bad = [record for record in records.values() if record["status"] in ("failed", "partial")]
    causes = collections.Counter((r["stage"], r["error_type"]) for r in bad)
    for key, number in [*sorted(by_kind.items()), *causes.most_common()]:
        print(number, *key)
    deaths = len(re.findall(r"the worker's process (?:ended|was lost)", printed))
    print(
        f"{len(made)} slides in {wall_s:.0f} s, {sum(watch.cpu_s.values()):.0f} s of CPU; "
        f"{deaths} deaths, {len(watch.workers)} worker processes; at most "
        f"{max(watch.peak_gib.values()):.2f} GiB each, {watch.most_gib:.2f} GiB at a time"
    )


def check_cohort(folder, num_mutants, seed, timeout_s, helpers):
    """Let a cohort with this number of mutants through `extract`, and check its promises."""
    made = write_cohort(folder / "slides", num_mutants, seed)
    assert sum(slide.kind != "intact" for slide in made) == num_mutants
    (folder / "loop").mkdir()
    cells = cells_of_intact(folder / "loop", helpers)
    before = tree(folder / "slides")
    started = time.monotonic()
    printed, watch = run_extract(folder, timeout_s)
    wall_s = time.monotonic() - started
    records = check_run(folder, made, cells)
    report(made, records, printed, watch, wall_s)
    assert tree(folder / "slides") == before
    # Ray's token; the folders that torch, and we for slides on object storage, begin with.
    assert set(tree(folder / "home")) <= {".ray", ".ray/auth_token"}
    assert {name.rsplit("_", 1)[0] for name in tree(folder / "tmp")} <= BEGUN
    assert tree(folder / "cwd") == {}
    assert {path.name for path in folder.iterdir()} == FOLDERS
    assert max(watch.peak_gib[key] for key in watch.workers) < WORKER_MOST_GIB
    assert watch.most_gib < ALL_MOST_GIB
    return made


@pytest.mark.timeout(600)
def test_a_cohort_of_broken_slides(tmp_path, helpers):
    check_cohort(tmp_path, 60, 3, 480, helpers)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_broken_slides(tmp_path, helpers):
    made = check_cohort(tmp_path, 1000, 1, 3000, helpers)
    assert {slide.kind for slide in made} == set(KINDS)
    assert len(MUTATORS) > 10
