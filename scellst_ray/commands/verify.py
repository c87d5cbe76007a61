"""`scellst-ray verify`: read a run in full, and say which files are not what was written."""

import json
from dataclasses import asdict, dataclass

from rich.console import Console

from scellst_ray.commands.reports import framed_table, line_printer
from scellst_ray.runs.verify import Verification, verify_run
from scellst_ray.storage.credentials import redact


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Read all files of a run and list those that are damaged, missing or exchanged."""

    run: str
    """Run folder of `extract` or `predict`. The name --run may be left out."""
    json: bool = False
    """Print JSON instead of a table."""


def verify(config: VerifyConfig) -> int:
    """Print what a verification found; return 1 if a file needs a remedy, else 0.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    found = verify_run(config.run)
    if config.json:
        print(json.dumps(_document(config.run, found), indent=2))  # noqa: T201 - lines as they are
    else:
        _show(Console(), config.run, found)
    return 1 if found.problems else 0


def _document(run: str, found: Verification) -> dict[str, object]:
    return {
        "run": redact(run),
        "files": found.num_files,
        "without_digest": found.num_unstamped,
        "problems": len(found.problems),
        "findings": [asdict(finding) for finding in found.findings],
    }


def _show(console: Console, run: str, found: Verification) -> None:
    if found.findings:
        headings = ("file", "is", "why", "remedy")
        rows = [(f.path, f.kind, f.problem, f.remedy) for f in found.findings]
        console.print(framed_table(headings, rows, "findings", wide_last=True))
    say = line_printer(console)
    if found.num_unstamped:
        say(
            f"an earlier release wrote {found.num_unstamped:,} tables without digests: they were "
            "read, but a changed value in them may be unnoticed"
        )
    verdict = f"{len(found.problems):,} need a remedy" if found.problems else "all are whole"
    say(f"{redact(run)}: {found.num_files:,} files read: {verdict}")
