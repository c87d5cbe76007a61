"""`scellst-ray models` and `scellst-ray models fetch NAME`: published weights, to see and have."""

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from scellst_ray import storage
from scellst_ray.models.weights.catalogue import (
    CATALOGUE,
    PublishedFile,
    cache_folder,
    find_published,
)
from scellst_ray.models.weights.digests import Digests, ExpectedFile, describe_mismatch, digests_of
from scellst_ray.models.weights.fetch import Patience, Report, WrongFileError, download, zenodo_file

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """Published weights: what they are, their licence and source, and whether they are here."""


@dataclass(frozen=True, kw_only=True)
class ModelsFetchConfig:
    """Download published weights into this machine's cache, checked against a known digest."""

    name: str
    """Which, as `scellst-ray models` lists them; may stand without --name."""
    url: str | None = None
    """A mirror to download from; the digest stays the same."""
    sha256: str | None = None
    """SHA-256 the file must have, in hex, instead of the one this release knows."""

    def __post_init__(self) -> None:
        """Refuse what is no digest, and names that are not in the catalogue."""
        find_published(self.name)
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            message = f"sha256 is {self.sha256!r}; give the 64 hex digits of a SHA-256"
            raise ValueError(message)


def list_models(config: ModelsConfig) -> int:
    """Print the catalogue; return 0."""
    del config
    console = Console()
    table = Table("name", "size", "here", show_lines=True)
    table.add_column("what, licence, source", overflow="fold")
    for model in CATALOGUE.values():
        about = f"{model.what}\n{model.licence}\n{model.source}"
        here = "yes" if model.is_here else "no"
        table.add_row(model.name, f"{model.size / 1e6:,.0f} MB", here, escape(about))
    console.print(table)
    console.print(f"folder: {cache_folder()}", markup=False, highlight=False, soft_wrap=True)
    console.print("fetch one: scellst-ray models fetch NAME", markup=False, highlight=False)
    return 0


def fetch_model(config: ModelsFetchConfig) -> int:
    """Fetch weights with progress on the console; return 0."""
    console = Console()
    say: Say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    model = find_published(config.name)
    say(f"{model.name}: {model.what}\nlicence: {model.licence}\nsource: {model.source}")
    bar, report = _shown(console, model.file_name)
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
    """Bring weights into the cache, and write down beside them what was received.

    The digest is the one asked for, else that of an earlier fetch, else the catalogue's. For
    files on Zenodo the MD5 that the record states is checked too, if the record can be read.

    Raises:
        ValueError: what came, or what is there already, is not what it should be.
        OSError: no network, no room, or another process is at it.
    """
    model = find_published(config.name)
    pinned = str(config.sha256 or model.lock_content.get("sha256") or model.sha256).lower()
    own = pinned.startswith(model.sha256)
    expected = ExpectedFile(model.size if own else None, pinned)
    if model.path.is_file():
        found = digests_of(model.path)
        wrong = describe_mismatch(found, expected)
        if wrong:
            message = f"{model.path}: {wrong}; remove it to fetch it anew{_lock_hint(model)}"
            raise ValueError(message)
        say(f"it is here already, and whole (SHA-256 {found.sha256})")
    else:
        if model.record and not config.url and own:
            expected = _with_record(model.record, expected, model, say, patience)
        try:
            found = download(config.url or model.url, model.path, expected, report, patience)
        except WrongFileError as error:
            message = f"{error}{_explained(error.found, expected)}{_lock_hint(model)}"
            raise ValueError(message) from error
        say(f"SHA-256 {found.sha256}; known beforehand: {pinned}")
    if not model.lock_content or model.lock_content["sha256"] != found.sha256:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        received = asdict(found) | {"url": config.url or model.url, "fetched": now}
        storage.publish_text(str(model.lock_path), json.dumps(received, indent=2) + "\n")


def _with_record(
    record: str, expected: ExpectedFile, model: PublishedFile, say: Say, patience: Patience | None
) -> ExpectedFile:
    """Add the MD5 that the record states; without a record, the pinned digest has to do."""
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


def _explained(found: Digests, expected: ExpectedFile) -> str:
    """Say what it means if the record vouches for a file that the catalogue does not know."""
    if expected.md5 is None or found.md5 != expected.md5:
        return ""
    return (
        ". Its MD5 is the one that the record states, so the authors may publish another file than "
        f"this release knows: --sha256 {found.sha256} accepts it"
    )


def _lock_hint(model: PublishedFile) -> str:
    """Name the file that holds the digest of an earlier fetch, if there is one."""
    return f" (the digest is that of {model.lock_path})" if model.lock_content else ""


def _shown(console: Console, name: str) -> tuple[AbstractContextManager[object], Report]:
    """Return a progress bar and what moves it; neither where nobody looks."""
    if not console.is_terminal:
        return nullcontext(), lambda _done, _size: None
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=console)
    task = bar.add_task(name, total=None)
    return bar, lambda done, size: bar.update(task, completed=done, total=size)
