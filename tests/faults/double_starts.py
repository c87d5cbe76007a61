"""Two drivers start on one new folder at the same moment: one works, the other is told so."""

import json
import multiprocessing
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from scellst_ray.runs.start import hold_run
from tests.faults.judge import LINE, judge_message
from tests.support.run_folders import Settings

WAIT_S, AHEAD_S = 120.0, 0.02
NAMES = ("hematoxylin", "imported")


@dataclass(frozen=True)
class Start:
    """What became of a pair of drivers.

    Attributes:
        differ: Whether their settings differed.
        apart_s: Seconds between their starts.
        faults: What was wrong; empty if one works, its run is in the folder, and the other one was
            refused in one line.
    """

    differ: bool
    apart_s: float
    faults: list[str]


def _drive(number, gate, when, answers, folder, num, differ_every):
    """Start on one folder after the other, each time together with the other process."""
    for pair in range(num):
        out = str(Path(folder) / f"run{pair}")
        name = NAMES[number if pair % differ_every == 0 else 0]
        if number == 0:
            when.value = time.monotonic() + AHEAD_S
        gate.wait(WAIT_S)
        while (started := time.monotonic()) < when.value:
            pass  # a sleep would end at another time in each process
        try:
            with hold_run(out, "extract", Settings({"segmenter": name})) as (run, lease):
                gate.wait(WAIT_S)  # the other one has its answer
                lease.check()
                answers.put((pair, number, started, "works", run.digest))
        except ValueError as error:
            gate.wait(WAIT_S)
            answers.put((pair, number, started, "refused", str(error)))
        gate.wait(WAIT_S)


def start_pairs(folder, num, differ_every=2):
    """Start `num` pairs of drivers; return what became of them.

    Args:
        folder: Folder for the run folders.
        num: Number of pairs.
        differ_every: Every such pair has different settings, the others have the same.
    """
    context = multiprocessing.get_context("spawn")
    gate, when, answers = context.Barrier(2), context.Value("d"), context.Queue()
    arguments = (gate, when, answers, str(folder), num, differ_every)
    processes = [context.Process(target=_drive, args=(n, *arguments)) for n in range(2)]
    for process in processes:
        process.start()
    got = {}
    for _ in range(2 * num):
        pair, number, *rest = answers.get(timeout=WAIT_S)
        got.setdefault(pair, {})[number] = rest
    for process in processes:
        process.join()
    return [_judge(Path(folder) / f"run{n}", got[n], n % differ_every == 0) for n in range(num)]


def _judge(out, answers, differ):
    """Return what became of one pair."""
    starts = [answers[number][0] for number in range(2)]
    works = [digest for _, state, digest in answers.values() if state == "works"]
    refusals = [text for _, state, text in answers.values() if state == "refused"]
    faults = []
    if len(works) != 1:
        faults.append(f"{len(works)} of 2 drivers work: {refusals}")
    there = json.loads((out / "run.json").read_text())["digest"]
    if works != [there]:
        faults.append(f"run.json is of {there}, and {works} work")
    faults += [text for text in refusals if judge_message(text, [str(out)])[0] != LINE]
    left = {path.name for path in out.iterdir()} - {"run.json"}
    faults += [f"{name} is left over" for name in left]
    shutil.rmtree(out)
    return Start(differ, abs(starts[0] - starts[1]), faults)
