"""Read files with the product's readers, each in its own process, and judge the outcomes.

`Judge` starts `python -m tests.faults.judge` once. That process imports all readers and forks a
child for each file, so a reader that ends its process costs nothing else.
"""

import dataclasses
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from scellst_ray.commands import table
from scellst_ray.core.logs import one_line
from tests.support.paths import ROOT

MPP = 0.5
TIMEOUT_S = 60.0
MOST_GIB = 1.0
# A message longer than this is no line that people read.
MOST_LETTERS = 2000
PRELOADED = (
    *("anndata.io", "h5py", "polars", "pyarrow.parquet", "shapely", "tifffile", "timm", "torch"),
    *("scellst_ray.commands.retry", "scellst_ray.models.encoder.encoder"),
    *("scellst_ray.models.mil.head", "scellst_ray.nuclei.imported.tiles"),
    *("scellst_ray.spots.hest", "scellst_ray.spots.read", "scellst_ray.spots.xenium"),
)
STATUS = Path("/proc/self/status")
WHOLE, LINE = "result", "one line"


@dataclass(frozen=True)
class Verdict:
    """What became of a file.

    Attributes:
        outcome: `WHOLE`, `LINE`, or else what was bad.
        text: The result in short, the message, or the traceback.
        gib: Highest memory beyond that of the process before it read, GiB.
    """

    outcome: str
    text: str
    gib: float = 0.0

    @property
    def is_good(self):
        return self.outcome in (WHOLE, LINE)


def read_spots_of(path):
    from scellst_ray.spots.read import read_spots

    return read_spots({"slide_id": "s", "spots": path}, MPP)


def read_st_array_of(path):
    from scellst_ray.spots.read import read_spots

    row = {"slide_id": "s", "spots": f"{path}/counts.tsv"}
    return read_spots(row | {"spot_positions": f"{path}/positions.tsv"}, MPP)


def read_xenium_of(path):
    from scellst_ray.spots.xenium import read_xenium

    return read_xenium(path, None, f"{path}/alignment.csv")


def read_hest_of(path):
    from scellst_ray.spots.hest import read_hest

    return read_hest(path)[0]


def read_segmentation_of(path):
    from scellst_ray.nuclei.imported.tiles import check_within, read_segmentation

    table = read_segmentation(Path(path), path)
    return check_within(table, 1000, 1000, path, MPP)


def read_head_of(path):
    """Read a head as `predict` does, and as readers of its results do."""
    from scellst_ray.models.mil.head import head_from_bytes
    from scellst_ray.models.mil.stored_head import read_last_layer

    head, _ = head_from_bytes(Path(path).read_bytes(), path)
    read_last_layer(path)
    return list(head.parameters())


def read_encoder_of(path):
    from scellst_ray.models.encoder.encoder import encoder_dim, load_encoder

    encoder_dim(path)
    return list(load_encoder(path).network.parameters())


def read_manifest_of(path):
    from scellst_ray.slides.manifest import read_manifest

    return read_manifest(path)


def read_run_config_of(path):
    """Read the settings of a run as `retry` does, without running it."""
    from unittest.mock import patch

    from scellst_ray.commands import retry
    from scellst_ray.commands.configs import RetryConfig

    jobs = {name: (kind, lambda config, _: config) for name, (kind, _) in retry.JOBS.items()}
    with patch.object(retry, "JOBS", jobs):
        return [retry.retry(RetryConfig(run=path))]


def read_command_config(command, path):
    """Read the settings of a command from a YAML file."""
    from scellst_ray.commands import cli
    from scellst_ray.commands.parse import UsageError, parse

    try:
        values = parse(command, [f"--config={path}"])
    except UsageError as error:
        raise ValueError(str(error)) from error
    return [cli._settings(table.COMMANDS[command], values)]


def end_of_itself(_path):
    """End this process, as a crash does."""
    os.kill(os.getpid(), signal.SIGKILL)


def take_memory(_path):
    """Take memory for a moment."""
    return bytes(bytearray(b"x") * int(0.75 * 2**30))[:1]


READERS = {
    "a reader that dies": end_of_itself,
    "a reader that takes 1.5 GiB": take_memory,
    "spots": read_spots_of,
    "st_array": read_st_array_of,
    "xenium": read_xenium_of,
    "hest": read_hest_of,
    "segmentation": read_segmentation_of,
    "head": read_head_of,
    "encoder": read_encoder_of,
    "manifest": read_manifest_of,
    "config of a run": read_run_config_of,
}


def read(reader, path):
    """Return what a reader makes of a path."""
    if reader in READERS:
        return READERS[reader](path)
    return read_command_config(reader.removeprefix("config "), path)


def judge(reader, path, files):
    """Read a path in this process; return the verdict.

    Args:
        reader: Key of `READERS`, or 'config' and a command.
        path: What it reads.
        files: The files that were mutated; an error must name one of them, or `path`.
    """
    try:
        result = read(reader, path)
    except (ValueError, OSError) as error:
        names = [Path(name).name for name in (path, *files)]
        # As the command line prints it, and as records hold it.
        return Verdict(*judge_message(one_line(str(error)), [*names, *settings_of(reader)]))
    except BaseException as error:  # noqa: BLE001 - a traceback is what is looked for
        lines = traceback.format_exc().splitlines()
        return Verdict(f"traceback {type(error).__name__}", "\n".join(lines[-12:])[-2500:])
    return Verdict(WHOLE, f"{type(result).__name__} of {len(result)}")


def settings_of(reader):
    """Return the settings of a command: a message that names one of them says what to change."""
    command = reader.removeprefix("config ")
    if reader in READERS:
        return []
    fields = [field.name for field in dataclasses.fields(table.COMMANDS[command].load_settings())]
    return [*fields, *(name.replace("_", "-") for name in fields)]


def judge_message(text, names):
    """Return the outcome of an error that people see, with its text."""
    if "\n" in text or not text.isprintable():
        return "message of several lines", text[:2000]
    if len(text) > MOST_LETTERS:
        return "message without end", text[:300]
    if not any(name in text for name in names):
        return "message without the file's name", text
    return LINE, text


def status_kib(name):
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def judge_measured(request):
    """Return the verdict, with memory measured and bounded."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status_kib("VmHWM")
    # Far beyond what is allowed, so that the machine survives and the peak tells.
    most = status_kib("VmData") * 1024 + 3 * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    verdict = judge(*request)
    gib = (status_kib("VmHWM") - before) / 2**20
    outcome = verdict.outcome if gib <= MOST_GIB else f"{gib:.1f} GiB"
    return Verdict(outcome, verdict.text, round(gib, 3))


def judge_in_child(request, timeout_s=TIMEOUT_S):
    """Fork a child that reads; return its verdict, or how it ended."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        verdict = judge_measured(request)
        os.write(writing, json.dumps(asdict(verdict)).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], timeout_s)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    content = b"" if not ready else os.read(reading, 1 << 16)
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    if not ready:
        return Verdict(f"no answer in {timeout_s:g} s", "")
    if not content:
        code = os.waitstatus_to_exitcode(status)
        name = signal.Signals(-code).name if code < 0 else str(code)
        return Verdict(f"process ended: {name}", "")
    return Verdict(**json.loads(content))


class Judge:
    """A process that forks a child for each file."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.judge"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, reader, path, files):
        """Return the verdict on a path."""
        self.process.stdin.write(json.dumps([reader, str(path), list(map(str, files))]) + "\n")
        self.process.stdin.flush()
        return Verdict(**json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def import_readers():
    """Import all that readers import, so that a fork costs milliseconds."""
    for name in PRELOADED:
        importlib.import_module(name)
    for command in ("extract", "predict", "train", "pretrain"):
        table.COMMANDS[command].load_settings()


def main():
    """Answer requests on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else is an answer
    import_readers()
    for line in sys.stdin:
        started = time.monotonic()
        verdict = judge_in_child(json.loads(line))
        answers.write(json.dumps(asdict(verdict)) + "\n")
        answers.flush()
        if time.monotonic() - started > 5:
            sys.stderr.write(f"{time.monotonic() - started:.0f} s: {line}")


if __name__ == "__main__":
    main()
