"""Runs of `extract` that are disturbed and started again until they are done.

Every slide has two contents of equal size. Whatever is replaced or damaged while a run works, or
between two commands, the table of a slide must be that of one of the contents, and never a mixture.
All runs share one Ray, in this process.
"""

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import patch

import yaml

from scellst_ray import storage
from scellst_ray.core.logs import one_line
from scellst_ray.pipelines.driver import Driver
from scellst_ray.pipelines.extract import extract
from scellst_ray.runs.folder import FINISHED, RunFolder
from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide
from scellst_ray.stages.config import ExtractConfig
from tests.faults.altered_runs import ALTERATIONS, KINDS
from tests.faults.judge import LINE, judge_message
from tests.support.paths import ROOT

SLIDES = ("s0", "s1", "s2")
OLD, NEW = "old", "new"
COMMANDS = 5
HALF_A_WRITE_S = 0.3


@dataclass
class Outcome:
    """What became of one disturbed run.

    Attributes:
        fault: What was done.
        result: 'equal', 'refused' or 'silent'.
        redone: Whether more than one command was needed.
        of: Which content each slide's table is of, by slide_id.
        text: The refusal, or what differs.
        seconds: Seconds of all commands.
    """

    fault: str
    result: str
    redone: bool
    of: dict = field(default_factory=dict)
    text: str = ""
    seconds: float = 0.0


class DiedError(Exception):
    """The driver of a run ends here."""


class Cohort:
    """Three slides of two contents each, and the tables of undisturbed runs.

    Attributes:
        folder: Local folder.
        root: Folder or URI of the slides and runs that are disturbed.
        contents: Bytes by (content, slide_id).
        tables: CELLS of undisturbed runs by (content, slide_id).
        run_s: Seconds of an undisturbed run.
    """

    def __init__(self, folder, root=None):
        self.folder, self.root = Path(folder), str(root or folder)
        self.contents, self.tables = {}, {}
        for number, slide_id in enumerate(SLIDES):
            pair = [self._slide(seed) for seed in (number, number + 100)]
            size = max(map(len, pair))  # bytes behind the end of a TIFF mean nothing
            for content, data in zip((OLD, NEW), pair, strict=True):
                self.contents[content, slide_id] = data + bytes(size - len(data))
        manifest = "slide_id,uri\n" + "".join(f"{s},{s}.tiff\n" for s in SLIDES)
        put(f"{self.root}/manifest.csv", manifest.encode())
        for content in (OLD, NEW):
            self.reset(content)
            started = time.monotonic()
            run_until_done(self.config(f"undisturbed-{content}"))
            self.run_s = time.monotonic() - started
            run = self.run(f"undisturbed-{content}")
            for slide_id in SLIDES:
                table = storage.read_table(run.cells_uri(slide_id))
                self.tables[content, slide_id] = table.replace_schema_metadata()
        self.reset()

    def _slide(self, seed):
        config = SyntheticConfig(seed=seed, width_um=400.0, height_um=400.0, num_genes=4)
        return write_synthetic_slide(self.folder / f"made{seed}", config).slide.read_bytes()

    def reset(self, content=OLD):
        for slide_id in SLIDES:
            put(self.uri(slide_id), self.contents[content, slide_id])

    def uri(self, slide_id):
        return f"{self.root}/{slide_id}.tiff"

    def run(self, name):
        return RunFolder(f"{self.root}/{name}", "")

    def config(self, name):
        return ExtractConfig(
            manifest=f"{self.root}/manifest.csv",
            out=f"{self.root}/{name}",
            encoder="none",
            core_px=192,
            workers=1,
            tiles_per_task=1,
        )

    def judge(self, name, fault, told):
        """Compare the tables of a run with those of undisturbed ones."""
        of, texts = {}, []
        for slide_id in SLIDES:
            uri = self.run(name).cells_uri(slide_id)
            table = storage.read_table(uri).replace_schema_metadata()
            same = [c for c in (OLD, NEW) if table.equals(self.tables[c, slide_id])]
            of[slide_id] = same[0] if same else "neither"
            if not same:
                texts.append(self._mixture(slide_id, table))
        result = "silent" if texts else "equal"
        return Outcome(fault, result, told.commands > 1, of, "; ".join(texts), told.seconds)

    def _mixture(self, slide_id, table):
        keys = [
            set(zip(*(t[c].to_pylist() for c in ("cell_id", "x0", "y0")), strict=True))
            for t in (table, self.tables[OLD, slide_id], self.tables[NEW, slide_id])
        ]
        return (
            f"{slide_id}: of {len(keys[0])} cells {len(keys[0] & keys[1])} are of the old content "
            f"and {len(keys[0] & keys[2])} of the new one"
        )


@dataclass
class Told:
    """What the commands on one run said: how many there were, and the refusal of the last."""

    commands: int = 0
    refusal: str = ""
    seconds: float = 0.0


def put(uri, data):
    """Publish bytes: a rename or one PUT."""
    storage.publish(uri, lambda path: path.write_bytes(data))


def overwrite(path, data):
    """Overwrite a local file in place, its second half a little later."""
    with Path(path).open("r+b") as file:
        half = len(data) // 2
        file.write(data[:half])
        file.flush()
        time.sleep(HALF_A_WRITE_S)
        file.write(data[half:])


def run_until_done(config):
    """Run a command until all slides are finished, or it is refused."""
    told, started = Told(), time.monotonic()
    for told.commands in range(1, COMMANDS + 1):
        try:
            records = extract(config)
        except DiedError:
            continue
        except (ValueError, OSError) as error:
            told.refusal = one_line(str(error))
            break
        if all(record["status"] in FINISHED for record in records.values()):
            told.refusal = ""
            break
        told.refusal = "; ".join(str(r.get("error")) for r in records.values() if r.get("error"))
    told.seconds = time.monotonic() - started
    return told


# How a slide is replaced: (cohort, slide_id) to nothing.


def by_rename(cohort, slide_id):
    """Put another file under the name."""
    put(cohort.uri(slide_id), cohort.contents[NEW, slide_id])


def by_rename_same_time(cohort, slide_id):
    """Put another file under the name, with the same time of change, as some copies have it."""
    path = Path(cohort.uri(slide_id))
    before = path.stat()
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(cohort.contents[NEW, slide_id])
    os.utime(temporary, ns=(before.st_atime_ns, before.st_mtime_ns))
    temporary.replace(path)


def in_place(cohort, slide_id):
    """Overwrite the file while others may read it."""
    overwrite(cohort.uri(slide_id), cohort.contents[NEW, slide_id])


LOCAL_WAYS = {
    "replaced by a rename": by_rename,
    "replaced by a rename, same time of change": by_rename_same_time,
    "overwritten in place": in_place,
}
REMOTE_WAYS = {"replaced on S3": by_rename}


def replaced(cohort, way, number):
    """Replace one to three slides at a random moment of a run, and run it until it is done."""
    rng = random.Random(f"{way} {number}")
    name = f"replaced-{number}-{way}".replace(" ", "-").replace(",", "")
    cohort.reset()
    chosen = rng.sample(SLIDES, rng.randint(1, len(SLIDES)))
    replace = (LOCAL_WAYS | REMOTE_WAYS)[way]
    moments = sorted((rng.uniform(0.0, 1.1 * cohort.run_s), slide_id) for slide_id in chosen)
    ended = threading.Event()

    def inject():
        started = time.monotonic()
        for moment, slide_id in moments:
            ended.wait(max(0.0, moment - (time.monotonic() - started)))
            replace(cohort, slide_id)

    thread = threading.Thread(target=inject)
    thread.start()
    try:
        first = run_until_done(cohort.config(name))
    finally:
        ended.set()
        thread.join()
    # Once more, now that no file changes: a run that refused goes on, a done one stays so.
    told = run_until_done(cohort.config(name))
    told.commands += first.commands - 1
    told.seconds += first.seconds
    outcome = finish(cohort, name, way, told)
    storage.remove_tree(cohort.run(name).uri)
    return outcome


def finish(cohort, name, fault, told, names=()):
    """Return the outcome of a run after its last command."""
    if told.refusal:
        is_line = judge_message(told.refusal, [cohort.run(name).uri, *SLIDES, *names])[0] == LINE
        result = "refused" if is_line else "refused without a line"
        return Outcome(fault, result, told.commands > 1, {}, told.refusal[:500], told.seconds)
    return cohort.judge(name, fault, told)


def half_done(cohort, name="half-done", tables=1):
    """Leave a run whose driver died: one slide is finished, of the others shards and receipts lie.

    The driver dies when all tiles are logged, and before it finishes the other slides.
    """
    cohort.reset()
    submit = Driver._submit

    def submit_some(self):
        done = sum(record["status"] in FINISHED for record in self.progress.records.values())
        under_way = sum(len(slides) for _, slides in self.finishing.values())
        if done + under_way < tables and self.waiting:
            rest = [self.waiting.pop() for _ in range(len(self.waiting) - 1)]
            submit(self)
            self.waiting.extend(rest)

    def die(self):
        self._log()
        self._submit()
        while self.finishing:
            self._collect(timeout=1)
        raise DiedError

    with patch.object(Driver, "_submit", submit_some), patch.object(Driver, "finish", die):
        try:
            extract(cohort.config(name))
        except DiedError:
            return Path(cohort.run(name).uri)
    message = "the driver did not die"
    raise RuntimeError(message)


RESUMED_KINDS = ("run.json", "slides.json", "config.yaml", "record", "receipts log", "shard")


def resumed(cohort, template, kind, alteration, number):
    """Alter one file of a half-done run, and run it until it is done."""
    rng = random.Random(f"resumed {kind} {alteration} {number}")
    name = f"resumed-{number}-{kind}-{alteration}".replace(" ", "-").replace("'", "")
    place = Path(cohort.run(name).uri)
    shutil.copytree(template, place)
    path = rng.choice(sorted(place.glob(KINDS[kind])))
    data = path.read_bytes()
    path.write_bytes(ALTERATIONS[alteration](rng, data, path))
    told = run_until_done(cohort.config(name))
    fault = f"{kind}: {alteration}"
    outcome = finish(cohort, name, fault, told, [path.name, path.stem])
    shutil.rmtree(place)
    return outcome


def killed(cohort, number, *, replace=False):
    """SIGKILL the driver at a random moment; a slide may be replaced before it goes on."""
    rng = random.Random(f"killed {number} {replace}")
    name = f"killed-{number}-{replace}"
    cohort.reset()
    settings = cohort.folder / f"{name}.yaml"
    settings.write_text(yaml.safe_dump(asdict(cohort.config(name))))
    words = [sys.executable, "-m", "scellst_ray.commands.cli", "extract", f"--config={settings}"]
    with (cohort.folder / f"{name}.log").open("wb") as log:
        driver = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
        while driver.poll() is None and not storage.exists(cohort.run(name).attempts_uri):
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, cohort.run_s))
        driver.kill()
        driver.wait()
    if replace:
        by_rename(cohort, rng.choice(SLIDES))
    told = run_until_done(cohort.config(name))
    told.commands += 1
    fault = "driver killed, then a slide replaced" if replace else "driver killed"
    outcome = finish(cohort, name, fault, told)
    storage.remove_tree(cohort.run(name).uri)
    return outcome
