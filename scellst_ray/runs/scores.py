"""SCORES: scores of cell types in every cell, which `annotate` adds to a run.

`scores/scores.json` is published last: without it no table of scores counts. A table is of one
EXPRESSION. If that has changed since, the table is refused.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NotRequired, TypedDict

import pyarrow as pa

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.core.names import check_names
from scellst_ray.runs.documents import read_document
from scellst_ray.runs.folder import SCORES, RunFolder
from scellst_ray.runs.reading import Run
from scellst_ray.runs.records import SlideRecord
from scellst_ray.runs.tables import check_digest, stamp_in

SCORES_FILE = "scores.json"
# Folder of the tables of all slides. No slide's table can have a name in it.
COHORT = "cohort"
AGAIN = "run `scellst-ray annotate` again"
# Keys of the metadata of a table: what was scored (`digest` of scores.json), and the EXPRESSION.
SCORED, EXPRESSION = b"scellst_ray.scores", b"scellst_ray.expression"


class ScoredType(TypedDict):
    """A cell type.

    Attributes:
        name: Its name.
        column: Its column in SCORES.
        markers: Its genes in the panel.
        missing: Its genes that are not in the panel.
        controls: Genes whose mean is subtracted from that of the markers.
    """

    name: str
    column: str
    markers: list[str]
    missing: list[str]
    controls: list[str]


class ScoredSlide(TypedDict):
    """A slide that has SCORES.

    Attributes:
        num_cells: Number of cells.
        num_unscored: Number of cells whose expression is not finite; they have no scores.
        expression: What tells the EXPRESSION: the SHA-256 of its file, or, of an earlier release,
            when the slide's record was written.
        file: Stamp of the table.
    """

    num_cells: int
    num_unscored: int
    expression: str
    file: storage.StoredStamp


class StoredAccuracy(TypedDict):
    """Agreement of best types with nucleus types.

    Attributes:
        type_map: Nucleus type that each scored type belongs to.
        recall: By nucleus type, share of its cells whose best type belongs to it.
        balanced_accuracy: Mean of the recalls.
        chance: The same of labels drawn evenly from these nucleus types.
        num_cells: Number of cells of these nucleus types.
    """

    type_map: dict[str, str]
    recall: dict[str, float]
    balanced_accuracy: float
    chance: float
    num_cells: int


class ScoresInfo(TypedDict):
    """Content of `scores/scores.json`.

    Attributes:
        digest: Digest of what was scored: types, formula, genes and EXPRESSION of all slides.
        formula: How scores are computed, in words.
        scaled: Whether genes were scaled to mean 0 and variance 1.
        target_total: Total to which each cell was normalised.
        num_bins: Number of bins in which control genes were chosen.
        types: The types, in the order of their columns.
        slides: The slides, by slide_id.
        tables: Stamps of the tables of all slides, by name; absent if there are none.
        agreement: How far best types agree with nucleus types; absent if they were not compared.
        source: Where the markers come from, in words.
        scellst_ray: Release.
        finished: UTC time.
    """

    digest: str
    formula: str
    scaled: bool
    target_total: float
    num_bins: int
    types: list[ScoredType]
    slides: dict[str, ScoredSlide]
    tables: NotRequired[dict[str, storage.StoredStamp]]
    agreement: NotRequired[StoredAccuracy]
    source: NotRequired[str]
    scellst_ray: NotRequired[str]
    finished: NotRequired[str]


def scores_info_uri(run_uri: str) -> str:
    """Return the URI of `scores.json`."""
    return storage.join(run_uri, SCORES, SCORES_FILE)


def scores_uri(run_uri: str, slide_id: str) -> str:
    """Return the URI of a slide's SCORES."""
    return storage.join(run_uri, SCORES, f"{slide_id}.parquet")


def column_of(name: str) -> str:
    """Return the column of a type: `score_` and its name, other characters than letters as `_`."""
    safe = re.sub(r"[^\w+.-]+", "_", name).strip("_")
    return f"score_{safe}"


def expression_of(record: SlideRecord) -> str:
    """Return what tells a slide's EXPRESSION from an earlier one, see ScoredSlide."""
    stamp = stamp_in(record, "EXPRESSION")
    return str(record.get("finished", "")) if stamp is None else stamp.sha256


def read_scores_info(run_uri: str) -> ScoresInfo | None:
    """Return the content of `scores.json`; None if the run has no scores.

    Raises:
        DamagedFileError: it is no such document.
    """
    uri = scores_info_uri(run_uri)
    try:
        return read_document(uri, ScoresInfo, f"remove it and {AGAIN}")
    except FileNotFoundError:
        return None


def score_types(run: Run) -> tuple[str, ...]:
    """Return the types that cells of a run are scored for, in order; none without scores.

    Raises:
        DamagedFileError: `scores.json` is damaged.
    """
    info = read_scores_info(run.uri)
    return () if info is None else tuple(each["name"] for each in info["types"])


def read_scores(
    run: Run,
    slide_id: str,
    columns: Sequence[str] | None = None,
    info: ScoresInfo | None = None,
) -> pa.Table | None:
    """Return the SCORES of a slide, in the order of CELLS; None if it has none.

    A slide without cells has a table without rows.

    Args:
        run: The run.
        slide_id: The slide.
        columns: The columns, in this order; all if None.
        info: Content of `scores.json`, if it was read before.

    Raises:
        DamagedFileError: the table is damaged, or is of another EXPRESSION than the slide has now.
        FileNotFoundError: the table is absent.
        ValueError: the slide has no record or failed, or a column is unknown.
    """
    (slide_id,) = run.choose([slide_id])
    info = read_scores_info(run.uri) if info is None else info
    if info is None:
        return None
    record = run.records[slide_id]
    schema = schemas.scores_schema([each["column"] for each in info["types"]])
    names = schema.names
    if columns is not None:
        names = check_names(columns, names, f"SCORES of slide {slide_id!r}")
    if not record.get("num_cells"):
        return schema.empty_table().select(names)
    if slide_id not in info["slides"]:
        return None
    check_scores(run.folder, record, info)
    uri, stamp = scores_uri(run.uri, slide_id), _stamp(info, slide_id)
    return storage.read_table(uri, columns=names, stamp=stamp)


def read_differential_genes(run: Run) -> pa.Table | None:
    """Return DIFFERENTIAL_GENES of a run; None if it has no scores. Errors as `read_scores`."""
    return _read_table(run, "DIFFERENTIAL_GENES")


def read_agreement(run: Run) -> pa.Table | None:
    """Return AGREEMENT of a run; None if it has no scores. Errors as `read_scores`."""
    return _read_table(run, "AGREEMENT")


def _read_table(run: Run, name: str) -> pa.Table | None:
    info = read_scores_info(run.uri)
    if info is None or name not in info.get("tables", {}):
        return None
    check_table(run.folder, run.records, name, info)
    return storage.read_table(table_uri(run.uri, name))


def table_uri(run_uri: str, name: str) -> str:
    """Return the URI of a table of all slides: DIFFERENTIAL_GENES or AGREEMENT."""
    return storage.join(run_uri, SCORES, COHORT, f"{name.lower()}.parquet")


def files_of(run_uri: str, info: ScoresInfo) -> list[str]:
    """Return the URIs of all files of the scores of a run."""
    slides = [scores_uri(run_uri, slide_id) for slide_id in info["slides"]]
    tables = [table_uri(run_uri, name) for name in info.get("tables", {})]
    return [scores_info_uri(run_uri), *slides, *tables]


def checks_of_scores(
    run: RunFolder, records: Mapping[str, SlideRecord], info: ScoresInfo
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield each table that `scores.json` names, and the function that checks all of it."""
    for slide_id in info["slides"]:
        if slide_id in records:
            check = partial(check_scores, run, records[slide_id], info, whole=True)
            yield scores_uri(run.uri, slide_id), check
    for name in info.get("tables", {}):
        yield table_uri(run.uri, name), partial(check_table, run, records, name, info, whole=True)


def check_scores(
    run: RunFolder, record: SlideRecord, info: ScoresInfo, *, whole: bool = False
) -> None:
    """Check that a slide's SCORES are those of `scores.json` and of the slide's EXPRESSION.

    Args:
        run: The run.
        record: The record of a slide that `info` names.
        info: Content of `scores.json`.
        whole: Whether all of the file is read and compared with its digest.

    Raises:
        DamagedFileError: the table is damaged, or another one.
        FileNotFoundError: it is absent.
        ValueError: it is of another kind.
    """
    slide_id = record["slide_id"]
    uri, slide = scores_uri(run.uri, slide_id), info["slides"][slide_id]
    if slide["expression"] != expression_of(record):
        raise storage.DamagedFileError(uri, _stale(slide_id), AGAIN)
    _check_file(run, uri, "SCORES", _stamp(info, slide_id), whole=whole)


def check_table(
    run: RunFolder,
    records: Mapping[str, SlideRecord],
    name: str,
    info: ScoresInfo,
    *,
    whole: bool = False,
) -> None:
    """Check a table of all slides; arguments and errors as `check_scores`.

    Args:
        run: The run.
        records: Records of the run's slides.
        name: DIFFERENTIAL_GENES or AGREEMENT.
        info: Content of `scores.json`.
        whole: Whether all of the file is read and compared with its digest.
    """
    uri = table_uri(run.uri, name)
    for slide_id, slide in info["slides"].items():
        if slide_id in records and slide["expression"] != expression_of(records[slide_id]):
            raise storage.DamagedFileError(uri, _stale(slide_id), AGAIN)
    stamp = storage.TableStamp.from_json(info["tables"][name])
    _check_file(run, uri, name, stamp, whole=whole)


def _stale(slide_id: str) -> str:
    return f"is stale: the EXPRESSION of slide {slide_id!r} has changed since"


def _check_file(
    run: RunFolder, uri: str, name: str, stamp: storage.TableStamp, *, whole: bool
) -> None:
    try:
        with storage.open_parquet(uri, stamp) as file:
            schemas.check(file.schema_arrow, name, uri)
            metadata = file.schema_arrow.metadata
        if metadata[b"scellst_ray.run_digest"].decode() != run.digest:
            raise storage.DamagedFileError(uri, "belongs to another run")
        if whole:
            check_digest(uri, stamp)
    except FileNotFoundError as error:
        message = f"{uri}: is absent, and {SCORES_FILE} names it; {AGAIN}"
        raise FileNotFoundError(message) from error
    except storage.DamagedFileError as error:
        raise storage.DamagedFileError(uri, error.problem, AGAIN) from error


def _stamp(info: ScoresInfo, slide_id: str) -> storage.TableStamp:
    return storage.TableStamp.from_json(info["slides"][slide_id]["file"])
