"""One cohort on several hosts, run by the command line, undisturbed and with faults.

`INJECTORS` lists the faults; `disturbed` runs the cohort under one, finishes the run as
its user would (the same command again, where its driver died) and compares all tables and records
with those of the undisturbed run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from scellst_ray import storage
from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide

SETTINGS = (
    "--encoder=random:0:resnet18",
    "--core-px=128",
    "--tiles-per-task=2",
    "--memory-gb=0.5",
    "--precision=float32",
    "--workers=3",
)
# Of a record: what a disturbed run may not change.
SAME = (
    *("slide_id", "status", "num_tiles", "num_tiles_done", "num_cells", "num_failed_tiles"),
    *("stage", "error_type", "mpp", "read_mpp"),
)
END_S = 900
KILLS = 5
CRASHING = "s9_crash"
RAYLET = "raylet/raylet"


@dataclass
class Outcome:
    """Outcome of one disturbed run.

    Attributes:
        fault: Name of the fault.
        num_faults: Number of injected faults.
        seconds: Seconds from the first command to the end of the last.
        commands: Number of runs of the command.
        differences: Differences from the undisturbed run; empty if there are none.
    """

    fault: str
    num_faults: int
    seconds: float
    commands: int
    differences: list[str] = field(default_factory=list)


def write_cohort(folder, num_slides=6):
    """Write slides and two manifests below a folder, manifest.csv and broken.csv.

    The second has one slide more, on which `broken_reader` crashes.
    """
    folder = Path(folder)
    lines = ["slide_id,uri"]
    for number in range(num_slides):
        size = {"width_um": 260.0 + 40.0 * (number % 3), "height_um": 260.0}
        paths = write_synthetic_slide(
            folder / f"s{number}", SyntheticConfig(seed=number, num_genes=4, **size)
        )
        lines.append(f"s{number},{paths.slide.relative_to(folder)}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    shutil.copytree(folder / "s0", folder / CRASHING)
    lines.append(lines[1].replace("s0", CRASHING))
    (folder / "broken.csv").write_text("\n".join(lines) + "\n")


def command(manifest, out, *more):
    """Return the command of a run."""
    words = [sys.executable, "-m", "scellst_ray.commands.cli", "extract"]
    return [*words, f"--manifest={manifest}", f"--out={out}", *SETTINGS, *more]


def broken_command(manifest, out):
    """Return the command of a run whose reader crashes on one slide."""
    first = [sys.executable, str(Path(__file__).with_name("broken_reader.py"))]
    return [*first, *command(manifest, out)[3:]]


def differences(out, expected):
    """Return how a run differs from the undisturbed one: in cells, records and files left over."""
    run, whole = RunFolder(str(out), ""), RunFolder(str(expected), "")
    found, wanted = run.records(), whole.records()
    texts = []
    crashed = found.pop(CRASHING, None)
    if crashed and (crashed["status"], crashed["error_type"]) != ("failed", "ProcessDied"):
        texts.append(f"the crashing slide is {crashed}")
    if set(found) != set(wanted):
        texts.append(f"slides {sorted(set(found) ^ set(wanted))} have a record in one run only")
    for slide_id in sorted(set(found) & set(wanted)):
        for name in SAME:
            pair = found[slide_id].get(name), wanted[slide_id].get(name)
            if pair[0] != pair[1]:
                texts.append(f"{slide_id}: {name} is {pair[0]!r}, not {pair[1]!r}")
        tables = [storage.read_table(r.cells_uri(slide_id)) for r in (run, whole)]
        if not tables[0].equals(tables[1]):
            texts.append(
                f"{slide_id}: {len(tables[0])} cells are not the {len(tables[1])} expected"
            )
    for name in ("shards", "attempts"):
        left = storage.list_all(storage.join(str(out), name))
        texts += [f"{uri} is left over" for uri in left]
    return texts


class Running:
    """A run that goes on while faults are injected."""

    def __init__(self, hosts, words, seed=0):
        self.hosts, self.words = hosts, words
        self.random = random.Random(seed)
        self.num_faults = self.commands = 0
        self.log = hosts.folder / f"run{time.monotonic_ns()}.log"
        self.began, self.seconds = time.monotonic(), 0.0
        self.process = None
        self.begin()

    @property
    def out(self):
        return next(word for word in self.words if word.startswith("--out=")).removeprefix("--out=")

    def begin(self):
        """Start the command, for the first time or again."""
        self.commands += 1
        with self.log.open("ab") as log:
            self.process = self.hosts.popen(self.words, stdout=log, stderr=log)

    def over(self):
        return self.process.poll() is not None

    def sleep(self, seconds):
        """Wait, but no longer than the run takes; return whether it goes on."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.over():
            time.sleep(0.05)
        return not self.over()

    def until_working(self):
        """Wait until workers are at tiles; return whether the run goes on."""
        while not self.over() and not storage.list_all(storage.join(self.out, "attempts")):
            time.sleep(0.1)
        return not self.over()

    def end(self):
        """Wait for the command; run it again while its end is not its own."""
        if self.process.wait(timeout=END_S) < 0:
            self.begin()
            self.process.wait(timeout=END_S)
        self.seconds = time.monotonic() - self.began
        return self.process.returncode


def disturbed(hosts, fault, words, expected, *, seed=0):
    """Run a cohort under a fault.

    Args:
        hosts: The cluster.
        fault: One of `INJECTORS`.
        words: The command.
        expected: Folder of the undisturbed run.
        seed: Seed of the times and targets of faults.
    """
    running = Running(hosts, words, seed)
    try:
        INJECTORS[fault](running)
        code = running.end()
    finally:
        if not running.over():
            running.process.kill()
            running.process.wait()
    found = []
    # 1: a slide failed, as it must where one crashes its reader.
    if code != (fault == CRASHED):
        found.append(f"exit code {code}: {running.log.read_text()[-3000:]}")
    else:
        found = differences(running.out, expected)
    return Outcome(fault, running.num_faults, running.seconds, running.commands, found)


def undisturbed(running):
    """Inject no fault."""


def kill_processes(running, title):
    """Kill a process of this kind on some host, a few times, with pauses between."""
    running.until_working()
    while running.num_faults < KILLS and running.sleep(running.random.uniform(1, 4)):
        workers = range(1, running.hosts.num + 1)
        found = [p for host in workers for p in running.hosts.titled(host, title)]
        if found:
            with suppress(psutil.NoSuchProcess):
                running.random.choice(found).send_signal(signal.SIGKILL)
                running.num_faults += 1


def worker_killed(running):
    """SIGKILL workers, as the kernel does when memory is short."""
    kill_processes(running, "ray::MapWorker")


def gpu_actor_killed(running):
    """SIGKILL actors of the stage that holds a GPU."""
    running.until_working()
    while running.num_faults < KILLS and running.sleep(running.random.uniform(1, 4)):
        if pids := gpu_actors(running.hosts):
            with suppress(ProcessLookupError):
                os.kill(running.random.choice(pids), signal.SIGKILL)
                running.num_faults += 1


def gpu_actors(hosts):
    """Return the processes of actors that have a GPU."""
    asking = hosts.popen(
        [sys.executable, "-c", GPU_ACTORS, hosts.api], stdout=subprocess.PIPE, text=True
    )
    output, _ = asking.communicate(timeout=60)
    return json.loads(output) if asking.returncode == 0 else []


GPU_ACTORS = """
import json, sys
from ray.util.state import list_actors
actors = list_actors(sys.argv[1], filters=[("state", "=", "ALIVE")], detail=True)
print(json.dumps([a.pid for a in actors if a.required_resources.get("GPU")]))
"""


def raylet_killed(running):
    """SIGKILL the raylet of a host, which takes its workers with it, and start it again."""
    running.until_working()
    if running.sleep(running.random.uniform(0, 3)):
        host = running.random.randrange(1, running.hosts.num + 1)
        for process in running.hosts.titled(host, RAYLET):
            process.send_signal(signal.SIGKILL)
        running.num_faults += 1
        revive(running, host)


def host_lost(running):
    """Take a host's network away and kill all that runs there, and start it again."""
    running.until_working()
    if running.sleep(running.random.uniform(0, 3)):
        host = running.random.randrange(1, running.hosts.num + 1)
        running.hosts.cut(host)
        running.hosts.kill(host)
        running.num_faults += 1
        revive(running, host)


def host_lost_for_good(running):
    """Kill all that runs on a host; the run goes on without it."""
    running.until_working()
    if running.sleep(running.random.uniform(0, 3)):
        running.hosts.kill(running.random.randrange(1, running.hosts.num + 1))
        running.num_faults += 1


def revive(running, host, after_s=3.0):
    """Start a lost host again, as the operator of the cluster does."""
    running.sleep(after_s)
    running.hosts.kill(host)
    running.hosts.join(host)
    running.hosts.start(host)


def host_cut_off(running):
    """Take a host off the network for 30 s; start it again if Ray has given it up."""
    running.until_working()
    if running.sleep(running.random.uniform(0, 3)):
        host = running.random.randrange(1, running.hosts.num + 1)
        running.hosts.cut(host)
        running.num_faults += 1
        time.sleep(30)
        running.hosts.join(host)
        # Ray may give it up yet, and does not take a host back.
        while running.sleep(1):
            if not running.hosts.titled(host, RAYLET):
                revive(running, host)
                return


def driver_killed(running, times=1):
    """SIGKILL the driver at a random moment, and run the same command again."""
    for _ in range(times):
        running.until_working()
        # From its first seconds of work to its last.
        if not running.sleep(running.random.uniform(0, 10)):
            return
        running.process.kill()
        running.process.wait()
        running.num_faults += 1
        running.begin()


def reader_crashes(running):
    """Count the segmentation faults: `broken_reader` notes each next to the slide."""
    manifest = next(word for word in running.words if word.startswith("--manifest="))
    noted = Path(manifest.removeprefix("--manifest=")).parent / CRASHING / "crashes"
    noted.unlink(missing_ok=True)
    running.process.wait(timeout=END_S)
    running.num_faults = noted.stat().st_size


def store_filled(running):
    """Let another job keep four fifths of every host's object store."""
    num_bytes = running.hosts.store_mib * 2**20 * 4 // 5
    words = [sys.executable, "-c", KEEP, str(num_bytes)]
    keeper = running.hosts.popen(words, stdout=subprocess.PIPE, text=True)
    try:
        running.num_faults += int(keeper.stdout.readline())
        running.process.wait(timeout=END_S)
    finally:
        keeper.kill()
        keeper.communicate()


KEEP = """
import sys, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as At
ray.init(address="auto", logging_level="ERROR")

@ray.remote(num_cpus=0.01)
class Keeper:
    def keep(self, num_bytes):
        self.kept = ray.put(bytes(num_bytes))
        return ray.get_runtime_context().get_node_id()

nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
keepers = [Keeper.options(scheduling_strategy=At(node, soft=False)).remote() for node in nodes]
print(len(set(ray.get([keeper.keep.remote(int(sys.argv[1])) for keeper in keepers]))), flush=True)
time.sleep(3600)
"""


CRASHED = "segmentation fault in the reader"
INJECTORS = {
    "nothing": undisturbed,
    "worker killed": worker_killed,
    "GPU-stage actor killed": gpu_actor_killed,
    "raylet killed": raylet_killed,
    "host lost": host_lost,
    "host lost for good": host_lost_for_good,
    "host cut off for 30 s": host_cut_off,
    "driver killed": driver_killed,
    "driver killed again and again": lambda running: driver_killed(running, 5),
    CRASHED: reader_crashes,
    "object store filled by others": store_filled,
}
