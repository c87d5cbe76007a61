"""Mutate spots, segmentations, heads, encoders, settings and manifests, and read them.

    python benchmarks/mutated_inputs.py [--count N] [--seed N] [--only INPUT ...] [--json FILE]

Every file is read by the product's reader in a process of its own, with 60 s and 1 GiB. A reader
must return a result, or raise a ValueError or OSError whose message is one line that names the
file. All else is bad: other errors, dead processes, more memory or time, other messages.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.faults.intact_inputs import write_inputs
from tests.faults.mutated_runs import judge_mutants


def main() -> int:
    """Judge all mutants, print a table and every bad one, and return 1 if any is bad."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="names of inputs; default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder, "intact"))
        inputs = [each for each in inputs if options.only is None or each.name in options.only]
        judged = judge_mutants(inputs, Path(folder), options.count, options.seed)
    if options.json:
        rows = [vars(one) | {"verdict": vars(one.verdict)} for one in judged]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    bad = [one for one in judged if not one.verdict.is_good]
    for one in bad:
        print(f"{one.name} {one.seed} {one.done} {one.file}: {one.verdict.outcome}")
        print("   ", one.verdict.text.encode(errors="backslashreplace").decode())
    print(table([one.kind for one in judged], [one.verdict.outcome for one in judged], "input"))
    done = [one.done for one in judged]
    print(table(done, [one.verdict.outcome for one in judged], "mutation"))
    print(f"most memory: {max(one.verdict.gib for one in judged):.2f} GiB")
    return int(bool(bad))


def table(kinds: list[str], outcomes: list[str], name: str) -> str:
    """Return the number of files of each kind and outcome as a Markdown table."""
    columns = [outcome for outcome, _ in Counter(outcomes).most_common()]
    lines = [f"| {name} | files | {' | '.join(columns)} |", "| --- " * (2 + len(columns)) + "|"]
    counts = Counter(zip(kinds, outcomes, strict=True))
    for kind in sorted(set(kinds)):
        cells = " | ".join(str(counts[kind, column] or "") for column in columns)
        lines.append(f"| {kind} | {kinds.count(kind)} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
