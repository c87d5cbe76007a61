"""Make mutants of all inputs and let judges read them."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

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


def judge_mutants(inputs, folder, count, seed=0, judges=None):
    """Return the verdicts on `count` mutants, as many of each kind of input.

    Args:
        inputs: The intact inputs.
        folder: Folder for the mutants.
        count: Number of mutants.
        seed: First seed.
        judges: Processes that read; None: two of their own.
    """
    by_kind = {}
    for intact in inputs:
        by_kind.setdefault(intact.kind, []).append(intact)
    kinds = list(by_kind.values())
    chosen = []
    for number in range(count):
        of_kind, turn = kinds[number % len(kinds)], number // len(kinds)
        chosen.append((of_kind[turn % len(of_kind)], seed + number))
    own = [] if judges else [Judge() for _ in range(NUM_JUDGES)]
    free = SimpleQueue()
    for judge in judges or own:
        free.put(judge)

    def judged(pair):
        intact, number = pair
        place = folder / f"m{number}" / intact.name
        file, done = make_mutant(intact, place, number)
        judge = free.get()
        try:
            verdict = judge(intact.reader, place / intact.path if intact.path else place, [file])
        finally:
            free.put(judge)
        shutil.rmtree(place.parent)
        return Judged(intact.name, intact.kind, number, file.name, done, verdict)

    try:
        with ThreadPoolExecutor(len(judges or own)) as threads:
            return list(threads.map(judged, chosen))
    finally:
        for judge in own:
            judge.close()
