"""Make mutants of all inputs and let judges read them."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from tests.faults.intact_inputs import write_inputs
from tests.faults.judge import Judge, Verdict
from tests.faults.mutated_inputs import make_mutant

NUM_JUDGES = 2


@dataclass(frozen=True)
class Judged:
    """A mutant and the verdict on it.

    Attributes:
        name: Name of the input.
        kind: Its kind.
        seed: Seed of the mutation.
        file: The file that was mutated.
        done: What was done to it.
        verdict: The verdict.
    """

    name: str
    kind: str
    seed: int
    file: str
    done: str
    verdict: Verdict


def judge_mutants(folder, count, seed=0, only=None, num_judges=NUM_JUDGES):
    """Return the verdicts on `count` mutants, as many of each kind of input.

    Args:
        folder: Folder for the files.
        count: Number of mutants.
        seed: First seed.
        only: Names of inputs; None: all.
        num_judges: Number of processes that read.
    """
    inputs = write_inputs(folder / "intact")
    by_kind = {}
    for intact in inputs:
        if only is None or intact.name in only:
            by_kind.setdefault(intact.kind, []).append(intact)
    chosen = []
    for number in range(count):
        kinds = list(by_kind)
        of_kind, turn = by_kind[kinds[number % len(kinds)]], number // len(kinds)
        chosen.append((of_kind[turn % len(of_kind)], seed + number))
    judges = SimpleQueue()
    for _ in range(num_judges):
        judges.put(Judge())

    def judged(pair):
        intact, number = pair
        place = folder / f"m{number}" / intact.name
        file, done = make_mutant(intact, place, number)
        judge = judges.get()
        try:
            verdict = judge(intact.reader, place / intact.path if intact.path else place, [file])
        finally:
            judges.put(judge)
        shutil.rmtree(place.parent)
        return Judged(intact.name, intact.kind, number, file.name, done, verdict)

    try:
        with ThreadPoolExecutor(num_judges) as threads:
            return list(threads.map(judged, chosen))
    finally:
        for _ in range(num_judges):
            judges.get().close()
