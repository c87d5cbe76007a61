"""SCORES: scores of cell types in every cell, which `annotate` adds to a run.

`scores/scores.json` is published last: without it no table of scores counts. A table is of one
EXPRESSION. If that has changed since, the table is refused.
"""

import re
from collections.abc import Sequence
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
        problem = f"is stale: the EXPRESSION of slide {slide_id!r} has changed since"
        raise storage.DamagedFileError(uri, problem, AGAIN)
    try:
        with storage.open_parquet(uri, _stamp(info, slide_id)) as file:
            schemas.check(file.schema_arrow, "SCORES", uri)
            metadata = file.schema_arrow.metadata
        if metadata[b"scellst_ray.run_digest"].decode() != run.digest:
            raise storage.DamagedFileError(uri, "belongs to another run")
        if whole:
            check_digest(uri, _stamp(info, slide_id))
    except FileNotFoundError as error:
        message = f"{uri}: is absent, and {SCORES_FILE} names it; {AGAIN}"
        raise FileNotFoundError(message) from error
    except storage.DamagedFileError as error:
        raise storage.DamagedFileError(uri, error.problem, AGAIN) from error


def _stamp(info: ScoresInfo, slide_id: str) -> storage.TableStamp:
    return storage.TableStamp.from_json(info["slides"][slide_id]["file"])
