"""Alter files of runs, replace slides, start drivers twice and kill them: nothing may stay silent.

    python benchmarks/silent_faults.py [--only PART ...] [--scale N] [--json FILE]

Parts: `readers` alters one file of a run and reads all of it; `starts` starts two drivers on one
folder; `replaced` and `s3` replace slides while a run works; `resumed` alters one file of a
half-done run and goes on with it; `killed` kills the driver. A fault is silent if tables or status
differ from those of an undisturbed run and nothing says so. `--scale 0.1` runs a tenth.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scellst_ray.pipelines.session import ray_session
from tests.faults import altered_runs, double_starts, resumed_runs, whole_run
from tests.support.s3_server import BUCKET, serving_s3

# Numbers of faults at scale 1.
READERS, STARTS, REPLACED, S3, RESUMED, KILLED = 4, 600, 12, 12, 1, 4
GOOD = ("as before", "told", "equal", "refused", "one works")
Fault = tuple[str, str, str, str]


def main() -> int:
    """Inject all faults, print a table and return 1 if any is silent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: list[Fault] = []
    for name in options.only:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for fault in PARTS[name](Path(folder), options.scale):
                found.append(fault)
                if fault[2] not in GOOD:
                    print("BAD", *fault, flush=True)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        if options.json:  # after each part, since all of them take an hour
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return int(any(fault[2] not in GOOD for fault in found))


def times(number: int, scale: float) -> int:
    """Return how often a fault is injected, at least once."""
    return max(1, round(number * scale))


def readers(folder: Path, scale: float) -> Iterator[Fault]:
    """Alter every kind of file of a run in every way; yield the worst answer of its readers."""
    run = whole_run.make_whole_run(folder / "run")
    expected = altered_runs.readings_of(run.uri)
    for kind in altered_runs.KINDS:
        for alteration in altered_runs.ALTERATIONS:
            for number in range(times(READERS, scale)):
                fault = kind, alteration, number
                answers = altered_runs.judge_altered(run.uri, expected, folder / "copy", *fault)
                if answers:
                    worst = max(answers, key=altered_runs.Answer.rank)
                    text = f"{worst.reading} of {worst.file} ({number}): {worst.text}"
                    yield f"readers: {kind}", alteration, worst.outcome, text


def starts(folder: Path, scale: float) -> Iterator[Fault]:
    """Start pairs of drivers on one new folder."""
    for start in double_starts.start_pairs(folder, times(STARTS, scale)):
        settings = "other settings" if start.differ else "the same settings"
        apart = "within 1 ms" if start.apart_s < 1e-3 else "more than 1 ms apart"
        outcome = "; ".join(start.faults) or "one works"
        yield f"two drivers, {settings}", apart, outcome, ""


def replaced(folder: Path, scale: float) -> Iterator[Fault]:
    """Replace local slides at random moments of runs."""
    with ray_session():
        cohort = resumed_runs.Cohort(folder)
        for way in resumed_runs.LOCAL_WAYS:
            for number in range(times(REPLACED, scale)):
                yield fault_of("slide", resumed_runs.replaced(cohort, way, number))


def s3(folder: Path, scale: float) -> Iterator[Fault]:
    """Replace slides on S3 at random moments of runs; the server is a simulation (moto)."""
    with ExitStack() as stack:
        stack.enter_context(serving_s3())
        cache = {"SCELLST_RAY_CACHE_DIR": str(folder / "cache")}
        stack.enter_context(patch.dict(os.environ, cache))
        stack.enter_context(ray_session())
        cohort = resumed_runs.Cohort(folder, f"s3://{BUCKET}")
        for way in resumed_runs.REMOTE_WAYS:
            for number in range(times(S3, scale)):
                yield fault_of("slide", resumed_runs.replaced(cohort, way, number))


def resumed(folder: Path, scale: float) -> Iterator[Fault]:
    """Alter files of a half-done run, and go on with it."""
    with ray_session():
        cohort = resumed_runs.Cohort(folder)
        template = resumed_runs.half_done(cohort)
        for kind in resumed_runs.RESUMED_KINDS:
            for alteration in altered_runs.ALTERATIONS:
                for number in range(times(RESUMED, scale)):
                    outcome = resumed_runs.resumed(cohort, template, kind, alteration, number)
                    outcome.fault = alteration
                    yield fault_of(f"resumed: {kind}", outcome)


def killed(folder: Path, scale: float) -> Iterator[Fault]:
    """Kill drivers at random moments, and go on; half of the times a slide is replaced between."""
    with ray_session():
        cohort = resumed_runs.Cohort(folder)
        for replace in (False, True):
            for number in range(times(KILLED, scale)):
                outcome = resumed_runs.killed(cohort, number, replace=replace)
                yield fault_of("driver", outcome)


PARTS = {
    "readers": readers,
    "starts": starts,
    "replaced": replaced,
    "s3": s3,
    "resumed": resumed,
    "killed": killed,
}


def fault_of(kind: str, outcome: resumed_runs.Outcome) -> Fault:
    """Return a row of the report."""
    of = Counter(outcome.of.values())
    text = outcome.text or ", ".join(f"{num} {content}" for content, num in sorted(of.items()))
    return kind, outcome.fault, outcome.result, text


def table(found: list[Fault]) -> str:
    """Return the numbers of faults of each kind and outcome as a Markdown table."""
    outcomes = [outcome for outcome, _ in Counter(fault[2] for fault in found).most_common()]
    lines = [f"| fault | injected | {' | '.join(outcomes)} |"]
    lines.append("| --- " * (2 + len(outcomes)) + "|")
    # Alterations of one kind of file share a row.
    named = [
        (k if k.startswith(("readers", "resumed")) else f"{k}: {w}", o) for k, w, o, _ in found
    ]
    counts = Counter(named)
    for name in dict.fromkeys(name for name, _ in named):
        cells = [counts[name, outcome] for outcome in outcomes]
        numbers = " | ".join(str(number or "") for number in cells)
        lines.append(f"| {name} | {sum(cells)} | {numbers} |")
    total = Counter(outcome for _, outcome in named)
    numbers = " | ".join(str(total[outcome]) for outcome in outcomes)
    return "\n".join([*lines, f"| all | {len(found)} | {numbers} |"])


if __name__ == "__main__":
    sys.exit(main())
