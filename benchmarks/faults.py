"""Inject faults into runs on several hosts, and compare the tables with those of a plain run.

    python benchmarks/faults.py [--only SCENARIO ...] [--faults NAME ...] [--times N] [--json FILE]

Hosts are network namespaces with Ray's own processes in each; they need root and iproute2. Every
run is compared with a run without faults: all cells, all records, no temporary files. Seconds lost
are those beyond the run without faults. They include the wait for lost hosts to come back.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray

from scellst_ray.core.version import __version__

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.faults.scenarios import SCENARIOS, outcomes, undisturbed_run


def main() -> int:
    """Run all faults, print a table and return 1 if any run differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--faults", nargs="+", help="faults to inject; default: all")
    parser.add_argument("--times", type=int, help="runs of each fault; default: as in the scenario")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        undisturbed_s = undisturbed_run(Path(folder))
        print(f"undisturbed: {undisturbed_s:.0f} s", flush=True)
        for name in options.only:
            for outcome in outcomes(name, folder, options.times, options.faults):
                found.append({"scenario": name, **asdict(outcome)})
                print(json.dumps(found[-1]), flush=True)
    print(table(found, undisturbed_s))
    if options.json:
        machine = {"cpus": os.cpu_count(), "python": platform.python_version()}
        versions = {"scellst_ray": __version__, "ray": ray.__version__}
        report = versions | {"machine": machine, "undisturbed_s": undisturbed_s, "runs": found}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(any(run["differences"] for run in found))


def table(found: list[dict[str, Any]], undisturbed_s: float) -> str:
    """Return the results of each fault as a Markdown table."""
    lines = ["| fault | runs | faults injected | equal | seconds lost, median (most) |"]
    lines.append("| --- | --- | --- | --- | --- |")
    kinds = dict.fromkeys((run["scenario"], run["fault"]) for run in found)
    for kind in kinds:
        runs = [run for run in found if (run["scenario"], run["fault"]) == kind]
        lost = [run["seconds"] - undisturbed_s for run in runs]
        equal = sum(not run["differences"] for run in runs)
        faults = sum(run["num_faults"] for run in runs)
        seconds = f"{np.median(lost):.0f} ({max(lost):.0f})"
        lines.append(f"| {kind[1]} ({kind[0]}) | {len(runs)} | {faults} | {equal} | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
