"""`scellst-ray models` lists published weights, `scellst-ray models fetch NAME` downloads them."""

import json
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from scellst_ray import storage
from scellst_ray.commands.reports import Say, framed_table, line_printer
from scellst_ray.models.weights.catalogue import (
    CATALOGUE,
    PublishedFile,
    cache_folder,
    find_published,
)
from scellst_ray.models.weights.digests import Digests, ExpectedFile, describe_mismatch, digests_of
from scellst_ray.models.weights.fetch import Patience, Report, WrongFileError, download, zenodo_file


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """List published weights: kind, licence and source, and whether this machine has them."""


@dataclass(frozen=True, kw_only=True)
class ModelsFetchConfig:
    """Download published weights into this machine's cache, checked against a known digest."""

    name: str
    """Name of the weights, as `scellst-ray models` lists it. The name --name may be left out."""
    url: str | None = None
    """Address of a mirror to download from. By default the publisher's. The digest is the same."""
    sha256: str | None = None
    """SHA-256 of the file as 64 hex digits. By default the one that this release knows. Give it if
    the authors replaced the file."""

    def __post_init__(self) -> None:
        """Refuse a malformed digest, and names that are not in the catalogue."""
        find_published(self.name)
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            message = f"sha256 is {self.sha256!r}; give the 64 hex digits of a SHA-256"
            raise ValueError(message)


def list_models(config: ModelsConfig) -> int:
    """Print the catalogue; return 0."""
    del config
    console = Console()
    rows = [
        (
            model.name,
            f"{model.size / 1e6:,.0f} MB",
            "yes" if model.is_here else "no",
            f"{model.what}\n{model.licence}\n{model.source}",
        )
        for model in CATALOGUE.values()
    ]
    headings = ("name", "size", "here", "what, licence, source")
    console.print(framed_table(headings, rows, wide_last=True, show_lines=True))
    say = line_printer(console)
    say(f"folder: {cache_folder()}")
    say("fetch one: scellst-ray models fetch NAME")
    return 0


def fetch_model(config: ModelsFetchConfig) -> int:
    """Fetch weights with progress on the console; return 0."""
    console = Console()
    say = line_printer(console)
    model = find_published(config.name)
    say(f"{model.name}: {model.what}\nlicence: {model.licence}\nsource: {model.source}")
    bar, report = _show_progress(console, model.file_name)
    with bar:
        fetch(config, say, report)
    say(f"{model.name} is {model.path}")
    return 0


def fetch(
    config: ModelsFetchConfig,
    say: Say = print,
    report: Report = lambda _done, _size: None,
    patience: Patience | None = None,
) -> None:
    """Download weights into the cache, and write their digests next to them.

    The expected digest is that of `config`, else of an earlier fetch, else of the catalogue. For
    files on Zenodo the MD5 of the record is checked too, if the record can be read.

    Raises:
        ValueError: the downloaded file, or the one in the cache, has another digest.
        OSError: no network, no space on the disk, or another process downloads the file.
    """
    model = find_published(config.name)
    pinned = str(config.sha256 or model.lock_content.get("sha256") or model.sha256).lower()
    own = pinned.startswith(model.sha256)
    expected = ExpectedFile(model.size if own else None, pinned)
    if model.path.is_file():
        digests = digests_of(model.path)
        difference = describe_mismatch(digests, expected)
        if difference:
            message = f"{model.path}: {difference}; remove it to fetch it again{_lock_hint(model)}"
            raise ValueError(message)
        say(f"it is in the cache already, and complete (SHA-256 {digests.sha256})")
    else:
        if model.record and not config.url and own:
            expected = _with_record(model.record, expected, model, say, patience)
        try:
            digests = download(config.url or model.url, model.path, expected, report, patience)
        except WrongFileError as error:
            message = f"{error}{_explain_mismatch(error.found, expected)}{_lock_hint(model)}"
            raise ValueError(message) from error
        say(f"SHA-256 {digests.sha256}; expected: {pinned}")
    if not model.lock_content or model.lock_content["sha256"] != digests.sha256:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        received = asdict(digests) | {"url": config.url or model.url, "fetched": now}
        storage.publish_text(str(model.lock_path), json.dumps(received, indent=2) + "\n")


def _with_record(
    record: str, expected: ExpectedFile, model: PublishedFile, say: Say, patience: Patience | None
) -> ExpectedFile:
    """Return what to expect with the MD5 of the record; unchanged if it cannot be read."""
    try:
        stated = zenodo_file(record, model.file_name, patience)
    except ConnectionError as error:
        say(f"{error}; checking the SHA-256 alone")
        return expected
    if stated.size != expected.size:
        message = (
            f"{model.name}: {model.source} states {stated.size:,} bytes, this release knows a file "
            f"of {expected.size:,}; if the authors replaced it, give its --sha256"
        )
        raise ValueError(message)
    return ExpectedFile(expected.size, expected.sha256, stated.md5)


def _explain_mismatch(digests: Digests, expected: ExpectedFile) -> str:
    """Return a hint if the record states a file that the catalogue does not know."""
    if expected.md5 is None or digests.md5 != expected.md5:
        return ""
    return (
        ". Its MD5 is that of the record, so the authors may have replaced the file that this "
        f"release knows: --sha256 {digests.sha256} accepts it"
    )


def _lock_hint(model: PublishedFile) -> str:
    """Return a hint at the file with the digest of an earlier fetch, if there is one."""
    return f" (the digest is that of {model.lock_path})" if model.lock_content else ""


def _show_progress(console: Console, name: str) -> tuple[AbstractContextManager[object], Report]:
    """Return a progress bar and the function that moves it; no bar without a terminal."""
    if not console.is_terminal:
        return nullcontext(), lambda _done, _size: None
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=console)
    task = bar.add_task(name, total=None)
    return bar, lambda done, size: bar.update(task, completed=done, total=size)
