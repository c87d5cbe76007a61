"""Verification of a run folder: whether each file that readers would use is what was written.

Memory is bounded by one row group for each of a few files at a time. Nothing is changed.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.models.mil.stored_head import HEAD_FILE, read_last_layer
from scellst_ray.runs.crop_files import file_uri, index_uri
from scellst_ray.runs.documents import (
    RECORD_NAME,
    checked_record,
    parse_lease,
    read_document,
    read_sources,
)
from scellst_ray.runs.folder import (
    DATA_FOLDERS,
    FINISHED,
    LEASE_FILE,
    RECORDS,
    RUN_FILE,
    SLIDES_FILE,
    SOURCES_REMEDY,
    THUMBNAILS,
    RunFolder,
    read_config,
    read_run_info,
    split_by_slide,
)
from scellst_ray.runs.identity import check_identity
from scellst_ray.runs.last_layer import LAST_LAYER_FILE, check_last_layer
from scellst_ray.runs.receipts_log import LOG_NAME, best_of_each_tile, read_log_file
from scellst_ray.runs.records import CropIndex, RunInfo, SlideCrops, SlideRecord, SlideSource
from scellst_ray.runs.scores import AGAIN as SCORES_AGAIN
from scellst_ray.runs.scores import (
    ScoresInfo,
    checks_of_scores,
    files_of,
    read_scores_info,
    scores_info_uri,
)
from scellst_ray.runs.shards import DamagedShardsError, Shards, SlideCells
from scellst_ray.runs.tables import check_digest, open_table, stamp_in, table_uri
from scellst_ray.runs.thumbnails import REMEDY, read_thumbnail

AGAIN = "run the same command again"
# Files read at a time.
NUM_CHECKS = 4
Kind = Literal["damaged", "missing", "foreign", "passed over"]


@dataclass(frozen=True)
class Finding:
    """A file that is not as it should be.

    Attributes:
        path: The file, within the run folder.
        kind: damaged, missing, foreign (whole, but another file than was written under this name),
            or passed over (no file of a run, which readers ignore; no problem).
        problem: What is wrong.
        remedy: What to do.
    """

    path: str
    kind: Kind
    problem: str
    remedy: str


@dataclass
class Verification:
    """What a verification found.

    Attributes:
        findings: Files that are not as they should be, by path.
        num_files: Number of files that were checked.
        num_unstamped: Number of tables among them of which no digest is known: an earlier release
            wrote them.
    """

    findings: list[Finding] = field(default_factory=list)
    num_files: int = 0
    num_unstamped: int = 0

    @property
    def problems(self) -> list[Finding]:
        """Return the findings that need a remedy."""
        return [finding for finding in self.findings if finding.kind != "passed over"]


def verify_run(run_uri: str) -> Verification:
    """Check all files of a run.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    run_uri = storage.absolute(run_uri)
    if not storage.exists(storage.join(run_uri, RUN_FILE)):
        message = f"{run_uri}: no run of scellst_ray (it has no run.json); give the --out of a run"
        raise FileNotFoundError(message)
    verifier = _Verifier(run_uri)
    verifier.verify()
    verifier.found.findings.sort(key=lambda finding: (finding.path, finding.problem))
    return verifier.found


class _Verifier:
    """The checks of one run."""

    def __init__(self, run_uri: str) -> None:
        self.uri, self.found = run_uri, Verification()
        self.scores: ScoresInfo | None = None

    def verify(self) -> None:
        whole: list[RunInfo] = []
        with self._noting(RUN_FILE, "put a copy of it back"):
            whole.append(read_run_info(storage.join(self.uri, RUN_FILE)))
            if "identity" in whole[0]:
                uri = storage.join(self.uri, RUN_FILE)
                check_identity(uri, whole[0]["identity"], whole[0]["digest"])
        self._check_documents()
        if not whole:  # nothing says to which run the tables must belong
            return
        (info,) = whole
        run = RunFolder(self.uri, info["digest"])
        records = self._read_records()
        checks: list[Callable[[], None]] = [
            *self._checks_of_tables(run, records),
            *self._checks_of_thumbnails(run, records),
            *self._checks_of_scores(run, records),
            *self._checks_of_log(run),
            *self._checks_of_crops(),
            partial(self._check_head, info),
            partial(self._check_shards, run, records),
            partial(self._pass_over, records),
        ]
        with ThreadPoolExecutor(NUM_CHECKS) as pool:
            for done in [pool.submit(check) for check in checks]:
                done.result()

    @contextmanager
    def _noting(self, path: str, remedy: str) -> Iterator[None]:
        """Count a file, and note it if it is damaged, absent or another one."""
        self.found.num_files += 1
        try:
            yield
        except storage.DamagedFileError as error:
            kind: Kind = "damaged" if error.problem.startswith("is damaged") else "foreign"
            self._note(path, kind, error.problem, error.remedy or remedy)
        except FileNotFoundError:
            self._note(path, "missing", "is absent", remedy)
        except (PermissionError, IsADirectoryError) as error:
            self._note(path, "damaged", f"cannot be read: {error.strerror}", remedy)
        except ValueError as error:  # of another kind, or of a newer release
            self._note(path, "foreign", str(error), remedy)

    def _note(self, path: str, kind: Kind, problem: str, remedy: str) -> None:
        self.found.findings.append(Finding(path, kind, problem, remedy))

    def _check_documents(self) -> None:
        place = partial(storage.join, self.uri)
        with self._noting(SLIDES_FILE, SOURCES_REMEDY):
            read_sources(place(SLIDES_FILE), SlideSource, SOURCES_REMEDY)
        with self._noting("config.yaml", "give the command its flags again"):
            read_config(self.uri)
        if storage.exists(place(LEASE_FILE)):
            with self._noting(LEASE_FILE, "remove it, if no driver works on the run"):
                parse_lease(storage.read_bytes(place(LEASE_FILE)), place(LEASE_FILE))

    def _read_records(self) -> dict[str, SlideRecord]:
        uris = storage.list_files(storage.join(self.uri, RECORDS))
        names = [name for uri in uris if RECORD_NAME.fullmatch(name := uri.rsplit("/", 1)[-1])]
        records: dict[str, SlideRecord] = {}

        def read(name: str) -> None:
            path = f"{RECORDS}/{name}"
            with self._noting(path, f"remove it and {AGAIN}, which does the slide again"):
                record = checked_record(storage.join(self.uri, path), SlideRecord)
                records[record["slide_id"]] = record

        with ThreadPoolExecutor(NUM_CHECKS) as pool:
            list(pool.map(read, names))
        return records

    def _checks_of_tables(
        self, run: RunFolder, records: Mapping[str, SlideRecord]
    ) -> Iterator[Callable[[], None]]:
        for record in records.values():
            names = [*record.get("tables", [])]
            if record.get("num_failed_tiles"):
                names.append("FAILURES")
            if "PROFILES" in record.get("files", {}):
                names.append("PROFILES")
            for name in names:
                yield partial(self._check_table, run, record, name)

    def _checks_of_thumbnails(
        self, run: RunFolder, records: Mapping[str, SlideRecord]
    ) -> Iterator[Callable[[], None]]:
        """Check the thumbnails that are there; earlier releases kept none."""
        there = set(storage.list_files(storage.join(self.uri, THUMBNAILS)))
        for slide_id, record in records.items():
            if run.thumbnail_uri(slide_id) in there:
                yield partial(self._check_thumbnail, run, record)

    def _check_thumbnail(self, run: RunFolder, record: SlideRecord) -> None:
        with self._noting(self._within(run.thumbnail_uri(record["slide_id"])), REMEDY):
            read_thumbnail(run, record)

    def _checks_of_scores(
        self, run: RunFolder, records: Mapping[str, SlideRecord]
    ) -> Iterator[Callable[[], None]]:
        """Check the scores of `annotate`, if the run has any."""
        uri = scores_info_uri(self.uri)
        if not storage.exists(uri):
            return
        with self._noting(self._within(uri), SCORES_AGAIN):
            self.scores = read_scores_info(self.uri)
        if self.scores is not None:
            for table, check in checks_of_scores(run, records, self.scores):
                yield partial(self._run_check, table, check)

    def _run_check(self, uri: str, check: Callable[[], None]) -> None:
        with self._noting(self._within(uri), SCORES_AGAIN):
            check()

    def _check_table(self, run: RunFolder, record: SlideRecord, name: str) -> None:
        uri, stamp = table_uri(run, name, record["slide_id"]), stamp_in(record, name)
        with self._noting(self._within(uri), AGAIN):
            with open_table(run, record, name):
                pass
            if stamp is not None:
                check_digest(uri, stamp)
                return
            self.found.num_unstamped += 1
            storage.read_all(uri)

    def _checks_of_log(self, run: RunFolder) -> Iterator[Callable[[], None]]:
        for uri in storage.list_files(run.receipts_uri):
            if LOG_NAME.fullmatch(uri.rsplit("/", 1)[-1]):
                yield partial(self._check_log_file, uri, run.digest)

    def _check_log_file(self, uri: str, digest: str) -> None:
        with self._noting(self._within(uri), f"{AGAIN}, which does its tiles again"):
            read_log_file(uri, schemas.RECEIPTS.names, digest)

    def _checks_of_crops(self) -> Iterator[Callable[[], None]]:
        uri = index_uri(self.uri)
        if not storage.exists(uri):
            return
        whole: list[CropIndex] = []
        with self._noting(self._within(uri), f"{AGAIN}, which writes it again"):
            whole.append(read_document(uri, CropIndex))
        for index in whole:
            for slide_id, crops in index["slides"].items():
                place = file_uri(self.uri, index["set"], slide_id)
                yield partial(self._check_crops, place, crops)

    def _check_crops(self, uri: str, crops: SlideCrops) -> None:
        remedy = f"remove the folder `crops` and {AGAIN}, which cuts all crops again"
        with self._noting(self._within(uri), remedy):
            if "file" in crops:
                stamp = storage.TableStamp.from_json(crops["file"])
                storage.read_footer(uri, stamp)
                check_digest(uri, stamp)
                return
            self.found.num_unstamped += 1
            digest = hashlib.sha256()
            with storage.open_parquet(uri) as file:
                for group in range(file.num_row_groups):
                    rows = file.read_row_group(group, ["cell_id", "image"])
                    digest.update(rows["cell_id"].to_numpy().astype("<i8").tobytes())
                    digest.update(b"".join(rows["image"].to_pylist()))
            if digest.hexdigest() != crops["digest"]:
                raise storage.DamagedFileError(uri, "is damaged: its digest differs")

    def _check_head(self, info: RunInfo) -> None:
        expected = info.get("identity", {}).get("head")
        if expected is None:
            return
        uri = storage.join(self.uri, HEAD_FILE)
        with self._noting(HEAD_FILE, "put a copy of the head back"):
            if storage.digest_of(uri) != expected:
                raise storage.DamagedFileError(uri, "is not the head of this run")
            layer = read_last_layer(uri, expected)
            with self._noting(LAST_LAYER_FILE, f"remove it and {AGAIN}, which writes it"):
                check_last_layer(self.uri, layer, info["digest"])

    def _check_shards(self, run: RunFolder, records: Mapping[str, SlideRecord]) -> None:
        """Check the shards from which unfinished slides would go on."""
        finished = [s for s, record in records.items() if record["status"] in FINISHED]
        receipts = run.all_receipts(without=finished)
        names = [uri.rsplit("/", 1)[-1] for uri in storage.list_files(run.shards_uri)]
        good = receipts.filter(pc.is_null(receipts["error"]))
        # The tiles of an absent shard have no receipt that counts.
        good = good.filter(pc.is_in(good["shard"], pa.array(names, pa.string())))
        order = [("slide_id", "ascending"), ("tile_id", "ascending")]
        best = best_of_each_tile(good).sort_by(order)
        self.found.num_files += len(set(best["shard"].to_pylist()))
        shards, noted = Shards(run), set()
        for slide_id, of_slide in split_by_slide(best):
            try:
                SlideCells(shards, slide_id, of_slide).check(thoroughly=True)
            except DamagedShardsError as error:
                for name, text in error.problems.items():
                    if name not in noted:
                        noted.add(name)
                        problem = text.removeprefix(f"{run.shard_uri(name)}: ")
                        kind: Kind = "damaged" if problem.startswith("is damaged") else "foreign"
                        remedy = f"{AGAIN}, which does its tiles again"
                        self._note(f"shards/{name}", kind, problem, remedy)

    def _pass_over(self, records: Mapping[str, SlideRecord]) -> None:
        """Note files in the folders of tables and records that no reader would use."""
        named = {
            self._within(table_uri(RunFolder(self.uri, ""), name, slide_id))
            for slide_id, record in records.items()
            for name in (*record.get("tables", []), *record.get("files", {}), "FAILURES")
        }
        if self.scores is not None:
            named |= set(map(self._within, files_of(self.uri, self.scores)))
        for path in storage.sizes(self.uri):
            within = path.removeprefix(storage.resolve(self.uri)[1].rstrip("/") + "/")
            folder, _, name = within.partition("/")
            if folder not in DATA_FOLDERS or name.startswith("."):
                continue
            patterns = {"records": RECORD_NAME, "receipts": LOG_NAME}
            is_odd = folder in patterns and not patterns[folder].fullmatch(name)
            if folder in ("cells", "expression", "profiles", "failures", "scores"):
                is_odd = within not in named
            if is_odd:
                self._note(within, "passed over", "no record names it; readers ignore it", "none")

    def _within(self, uri: str) -> str:
        return uri.removeprefix(f"{self.uri}/")
