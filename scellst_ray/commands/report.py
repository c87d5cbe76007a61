"""The command `report`: a run as HTML pages."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from scellst_ray import storage
from scellst_ray.commands.configs import ReportConfig
from scellst_ray.commands.reports import line_printer
from scellst_ray.core.resolution import CONFIRMED
from scellst_ray.pipelines.over_slides import SlideResult, over_slides, values_of
from scellst_ray.report.cohort import (
    SlideOutline,
    has_page,
    outline_of,
    say_problems,
    view_cohort,
)
from scellst_ray.report.evaluation import read_evaluation
from scellst_ray.report.genes import choose_shown_genes
from scellst_ray.report.render import INDEX, page_name, render_cohort, render_slide
from scellst_ray.report.slide import Asked, view_slide
from scellst_ray.runs.folder import RUN_FILE
from scellst_ray.runs.reading import Run, open_run
from scellst_ray.runs.scores import ScoresInfo, read_scores_info
from scellst_ray.slides.manifest import read_manifest


def run_report(config: ReportConfig) -> int:
    """Run `report`; return 0.

    Raises:
        ValueError: the run, a file or the output cannot be used, or some pages lack a part. All
            other pages were written before.
    """
    # Absolute, since Ray's workers run in other folders.
    run, out = open_run(storage.absolute(config.run)), storage.absolute(config.out)
    if storage.exists(storage.join(out, RUN_FILE)):
        message = f"{config.out}: is the folder of a run; give another --out"
        raise ValueError(message)
    genes, how_chosen = choose_shown_genes(run, config.genes)
    evaluation = None if config.evaluation is None else read_evaluation(config.evaluation)
    slide_ids = sorted({*run.sources, *run.records}) if config.slides is None else config.slides
    if config.slides is not None:
        run.choose(config.slides)
    with_page = [s for s in slide_ids if s in run.records and has_page(run.records[s])]
    scores = _scores_info(run)
    beside = None if config.beside is None else _other_run(run, config.beside)
    asked = Asked(tuple(genes), _spots_rows(config.manifest), evaluation, scores, beside)
    results = list(over_slides(partial(_write_slide, run, out, asked), with_page))
    outlines = {result.slide_id: _outline(result) for result in results}
    view = view_cohort(run, slide_ids, outlines, (genes, how_chosen), evaluation, scores, beside)
    index = storage.join(out, INDEX)
    storage.publish_text(index, render_cohort(view))
    dict(values_of(_failing_only(results), "reported"))
    problem = say_problems(outlines)
    if problem is not None:
        raise ValueError(problem)
    line_printer()(
        f"wrote {storage.join(config.out, INDEX)} and the pages of {len(results)} slide(s)"
    )
    return 0


def _write_slide(run: Run, out: str, asked: Asked, slide_id: str) -> SlideOutline:
    # The run travels as it was opened: to open it again for each slide reads every record.
    view = view_slide(run, slide_id, asked)
    name = run.uri.rstrip("/").rsplit("/", 1)[-1]
    storage.publish_text(storage.join(out, page_name(slide_id)), render_slide(view, name))
    return outline_of(view)


def _outline(result: SlideResult[SlideOutline]) -> SlideOutline:
    """Return what the page of the cohort shows of a slide, also if its page was not written."""
    return result.value or SlideOutline(problems=[f"no page: {result.error}"])


def _failing_only(
    results: list[SlideResult[SlideOutline]],
) -> Iterator[SlideResult[SlideOutline]]:
    return (result for result in results if result.error is not None)


def _other_run(run: Run, uri: str) -> Run:
    """Open the run to be shown beside another one.

    Raises:
        ValueError: it is the same run, or both share no slide.
        FileNotFoundError: there is no run.
    """
    other = open_run(storage.absolute(uri))
    if other.uri == run.uri:
        message = f"--beside {uri}: is the run itself; give another run of the same slides"
        raise ValueError(message)
    if not set(run.records) & set(other.records):
        message = f"--beside {uri}: shares no slide_id with {run.uri}; give a run of its slides"
        raise ValueError(message)
    return other


def _scores_info(run: Run) -> ScoresInfo | None:
    """Return what the run says of its scores; None without scores."""
    try:
        return read_scores_info(run.uri)
    except storage.DamagedFileError:
        return None  # the page of each slide says so


def _spots_rows(manifest: str | None) -> Mapping[str, dict[str, Any]]:
    """Return the rows of a manifest that name spots, as `read_spots` takes them, by slide_id.

    Raises:
        ValueError: the manifest cannot be used.
    """
    rows = [] if manifest is None else read_manifest(manifest)
    return {
        row.slide_id: {**row.columns, "slide_id": row.slide_id, CONFIRMED: _yes(row.mpp_confirmed)}
        for row in rows
        if row.columns.get("spots")
    }


def _yes(value: bool) -> str:  # noqa: FBT001 - a value of the manifest
    return "yes" if value else "no"
