"""The command `annotate`: scores of cell types in every cell of a run."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import pyarrow as pa

from scellst_ray import storage
from scellst_ray.annotation.agreement import (
    accuracy,
    agreement_table,
    parse_type_map,
    same_names,
    shares,
)
from scellst_ray.annotation.differential import comparable_types, differential_genes
from scellst_ray.annotation.gene_scores import CONTROLS_PER_BIN, NUM_BINS, Scorer, make_scorer
from scellst_ray.annotation.markers import PanelSets, find_in_panel, read_markers
from scellst_ray.annotation.moments import Moments, merge_moments
from scellst_ray.annotation.normalised import TARGET_TOTAL, merge_types, slide_moments
from scellst_ray.annotation.reference import read_reference, top_markers
from scellst_ray.annotation.score_slide import Counts, Plan, score_slide
from scellst_ray.commands.configs import AnnotateConfig
from scellst_ray.commands.reports import Say, line_printer, plain_table
from scellst_ray.core.names import check_names
from scellst_ray.core.version import __version__
from scellst_ray.export.free_names import free_names
from scellst_ray.pipelines.over_slides import SlideResult, over_slides, values_of
from scellst_ray.runs.documents import checked_record, publish_document
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.lease import hold_lease
from scellst_ray.runs.reading import Run, open_run
from scellst_ray.runs.records import RunInfo, SlideRecord
from scellst_ray.runs.scores import (
    ScoredSlide,
    ScoresInfo,
    check_scores,
    check_table,
    column_of,
    expression_of,
    read_scores_info,
    scores_info_uri,
    table_uri,
)
from scellst_ray.storage.credentials import redact

T = TypeVar("T")
# More types than this make lines too long to print.
MOST_COLUMNS = 12
logger = logging.getLogger(__name__)


def run_annotate(config: AnnotateConfig) -> int:
    """Run `annotate`; return 0.

    Raises:
        ValueError: the run or the markers cannot be used, or some slides failed. The other slides
            have their scores then.
    """
    # Absolute, since Ray's workers run in other folders.
    run, say = open_run(storage.absolute(config.run)), line_printer()
    sets, source = _marker_sets(config, run.choose_genes())
    for line in sets.lines():
        logger.warning("%s", line)
    type_map = parse_type_map(config.type_map or (), list(sets.present))
    with hold_lease(run.uri):
        run = open_run(run.uri)
        slide_ids = _slides_to_score(run)
        stored = read_scores_info(run.uri)
        if stored is not None and _is_done(run, stored, _digest(run, slide_ids, sets, config)):
            say(f"{config.run}: all {len(slide_ids)} slide(s) have these scores already")
            _compare(run, stored, type_map, say)
            return 0
        if stored is not None:
            # Scores of two calls must never be taken for those of one.
            storage.remove_files([scores_info_uri(run.uri)])
        moments, failed = _collect(
            over_slides(partial(_moments, run.folder, run.info), slide_ids), "read"
        )
        by_type = merge_types(list(moments.values()))
        check_names(sorted(set(type_map.values())), list(by_type), "type_map: nucleus types")
        scorer = _scorer(run, merge_moments(list(by_type.values())), sets, config)
        columns = tuple(free_names([column_of(t) for t in scorer.names], is_cased=False))
        plan = Plan(scorer, columns, _digest(run, list(moments), sets, config))
        work = partial(_score, run.folder, run.info, plan)
        found, failed_now = _collect(over_slides(work, list(moments)), "scored")
        counts = {slide_id: of_slide for slide_id, (_, of_slide) in found.items()}
        info = _info(run, plan, sets, {s: slide for s, (slide, _) in found.items()}, config)
        info["source"] = source
        info["tables"] = {
            name: _publish(run, name, table)
            for name, table in (
                ("DIFFERENTIAL_GENES", differential_genes(by_type, run.genes, run.folder.digest)),
                ("AGREEMENT", agreement_table(counts, run.folder.digest)),
            )
        }
        publish_document(scores_info_uri(run.uri), info)
        _say_scores(say, config.run, info, counts)
        _say_left_out(by_type)
        _compare(run, info, type_map, say)
    if failed or failed_now:
        raise ValueError(failed or failed_now)
    return 0


def _marker_sets(config: AnnotateConfig, panel: Sequence[str]) -> tuple[PanelSets, str]:
    """Return the markers that are in the panel, and where they come from, in words."""
    if config.markers is not None:
        uri = config.markers
        return find_in_panel(read_markers(uri), panel, uri), f"markers of {redact(uri)}"
    uri, number = str(config.reference), config.markers_per_type
    reference = read_reference(uri, config.reference_key, panel)
    sets = top_markers(reference, number, panel if config.panel_markers else None)
    source = (
        f"{number} genes of highest t (variance overestimated) for each {config.reference_key} of "
        f"{redact(uri)}"
    )
    return find_in_panel(sets, panel, uri), source


def _slides_to_score(run: Run) -> list[str]:
    """Return the slides that have cells; say which failed.

    Raises:
        ValueError: there is none.
    """
    failed = sorted(s for s, record in run.records.items() if record["status"] == "failed")
    if failed:
        names = ", ".join(failed[:10]) + (" ..." if len(failed) > 10 else "")
        logger.warning("%d slide(s) failed and are left out: %s", len(failed), names)
    slide_ids = [s for s in run.choose() if run.records[s].get("num_cells")]
    if not slide_ids:
        message = f"{run.uri}: no slide has cells, so there is nothing to score"
        raise ValueError(message)
    return slide_ids


def _digest(run: Run, slide_ids: Sequence[str], sets: PanelSets, config: AnnotateConfig) -> str:
    """Return the digest of all that decides scores."""
    content = {
        "formula": 1,
        "run": run.folder.digest,
        "scale": config.scale,
        "types": list(sets.present.items()),
        "slides": {s: expression_of(run.records[s]) for s in slide_ids},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _is_done(run: Run, stored: ScoresInfo, digest: str) -> bool:
    """Return whether all scores are there and whole."""
    if stored["digest"] != digest or "tables" not in stored:
        return False
    try:
        for slide_id in stored["slides"]:
            check_scores(run.folder, run.records[slide_id], stored)
        for name in stored.get("tables", {}):
            check_table(run.folder, run.records, name, stored)
    except (storage.DamagedFileError, FileNotFoundError) as error:
        logger.warning("%s", error)
        return False
    return True


def _collect(results: Iterator[SlideResult[T]], what: str) -> tuple[dict[str, T], str]:
    """Return the values of the slides that succeeded, and why others did not.

    Raises:
        ValueError: none succeeded.
    """
    found: dict[str, T] = {}
    try:
        found.update(values_of(results, what))
    except ValueError as error:
        if not found:
            raise
        return found, f"{error}; the other slides are scored without them"
    return found, ""


def _scorer(run: Run, whole: Moments, sets: PanelSets, config: AnnotateConfig) -> Scorer:
    place = {gene: number for number, gene in enumerate(run.genes)}
    indices = {name: [place[g] for g in genes] for name, genes in sets.present.items()}
    scorer = make_scorer(whole, indices, scale=config.scale)
    if scorer.num_bins < NUM_BINS:
        logger.warning(
            "the panel of %d genes is small: control genes are chosen in %d bins of expression, "
            "not in %d, as otherwise some type would have none",
            len(place),
            scorer.num_bins,
            NUM_BINS,
        )
    return scorer


def _info(
    run: Run,
    plan: Plan,
    sets: PanelSets,
    slides: Mapping[str, ScoredSlide],
    config: AnnotateConfig,
) -> ScoresInfo:
    """Return the content of `scores.json`."""
    scaled = " and each gene was scaled to mean 0 and variance 1 over all cells" * config.scale
    formula = (
        "mean of the type's markers minus mean of its control genes, after each cell was "
        f"normalised to a total of {TARGET_TOTAL:,.0f}{scaled}. Controls are up to "
        f"{CONTROLS_PER_BIN} genes from each of {plan.scorer.num_bins} bins of mean expression "
        "that holds a marker (scanpy's score_genes)"
    )
    genes = run.genes
    return {
        "digest": plan.digest,
        "formula": formula,
        "scaled": config.scale,
        "target_total": TARGET_TOTAL,
        "num_bins": plan.scorer.num_bins,
        "types": [
            {
                "name": name,
                "column": column,
                "markers": sets.present[name],
                "missing": sets.missing[name],
                "controls": [genes[i] for i in controls],
            }
            for name, column, controls in zip(
                plan.scorer.names, plan.columns, plan.scorer.controls, strict=True
            )
        ],
        "slides": dict(slides),
        "scellst_ray": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _publish(run: Run, name: str, table: pa.Table) -> storage.StoredStamp:
    """Publish a table of all slides; return the stamp of its file."""
    uri = table_uri(run.uri, name)
    stamp = storage.publish_stamped(uri, table.schema, lambda writer: writer.write_table(table))
    return stamp.as_json()


def _compare(run: Run, info: ScoresInfo, type_map: Mapping[str, str], say: Say) -> None:
    """Compare best types with nucleus types; `scores.json` keeps the result.

    Args:
        run: The run.
        info: Content of `scores.json`.
        type_map: Nucleus type of each scored type; if empty, that of the same name.
        say: Prints a line.
    """
    table = storage.read_table(table_uri(run.uri, "AGREEMENT"))
    names = [each["name"] for each in info["types"]]
    nuclei = sorted(set(table["nucleus_type"].to_pylist()))
    check_names(sorted(set(type_map.values())), nuclei, "type_map: nucleus types")
    if len(names) <= MOST_COLUMNS:
        for line in plain_table(["nucleus type", "cells", *names], shares(table, names)):
            say(line)
    found = accuracy(table, type_map or same_names(names, nuclei))
    before = info.pop("agreement", None)
    if found is not None:
        info["agreement"] = found.as_json()
        say(
            f"agreement with nucleus types: balanced accuracy {found.balanced:.3f} over "
            f"{len(found.recall)} types (chance {found.chance:.3f}), {found.num_cells:,} cells"
        )
    if info.get("agreement") != before:
        publish_document(scores_info_uri(run.uri), info)


def _say_left_out(by_type: Mapping[str, Moments]) -> None:
    left_out = sorted(set(by_type) - set(comparable_types(by_type)))
    if len(by_type) == 1:
        logger.warning(
            "all nuclei are of one type, %r: there are no differential genes of nucleus types. "
            "The segmenter cellvit gives types",
            left_out[0],
        )
    elif left_out:
        logger.warning("too few cells for differential genes of type(s) %s", ", ".join(left_out))


def _say_scores(say: Say, run: str, info: ScoresInfo, counts: Mapping[str, Counts]) -> None:
    best = Counter[str | None]()
    for of_slide in counts.values():
        for (_, name), number in of_slide.items():
            best[name] += number
    cells, names = best.total(), [each["name"] for each in info["types"]]
    say(f"{run}: scored {cells:,} cells of {len(counts)} slide(s) for {len(names)} type(s)")
    for name in names:
        say(f"  {name}: best in {best[name]:,} cells ({best[name] / max(1, cells):.1%})")
    if best[None]:
        say(f"  {best[None]:,} cells have no scores, as their expression is not finite")


def _slide(folder: RunFolder, info: RunInfo, slide_id: str) -> Run:
    """Open a run with the record of one slide alone."""
    record = checked_record(folder.record_uri(slide_id), SlideRecord)
    return Run(folder, info, {slide_id: record})


def _moments(folder: RunFolder, info: RunInfo, slide_id: str) -> dict[str, Moments]:
    return slide_moments(_slide(folder, info, slide_id), slide_id)


def _score(
    folder: RunFolder, info: RunInfo, plan: Plan, slide_id: str
) -> tuple[ScoredSlide, Counts]:
    return score_slide(_slide(folder, info, slide_id), slide_id, plan)
