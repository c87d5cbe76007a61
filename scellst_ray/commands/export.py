"""The command `export`: the suffix of the output decides the format."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from scellst_ray import storage
from scellst_ray.commands.configs import ExportConfig
from scellst_ray.commands.reports import line_printer
from scellst_ray.export.anndata_file import write_anndata
from scellst_ray.export.explorer import write_explorer
from scellst_ray.export.geojson import write_geojson
from scellst_ray.export.geopackage import write_geopackage
from scellst_ray.export.spatialdata_store import write_spatialdata
from scellst_ray.pipelines.over_slides import over_slides, values_of
from scellst_ray.report.evaluation import read_evaluation
from scellst_ray.runs.reading import Run, open_run

Writer = Callable[[Run, ExportConfig, str, list[str] | None], int]


def run_export(config: ExportConfig) -> int:
    """Run `export`; return 0.

    Raises:
        ValueError: slides, genes or the output cannot be used, or some slides of `--per-slide`
            failed.
    """
    suffix = suffix_of(config.out)
    _check_evaluation(config.evaluation, suffix)
    config = _with_absolute_paths(config)
    run, say = open_run(config.run), line_printer()
    if not config.per_slide:
        _refuse_folder(config.out)
        count = WRITERS[suffix](run, config, config.out, config.slides)
        say(f"wrote {config.out}: {count:,} cells")
        return 0
    chosen = [s for s in run.choose(config.slides) if run.records[s]["num_cells"]]
    results = over_slides(partial(_export_slide, run, config), chosen)
    for slide_id, count in values_of(results, "exported"):
        say(f"wrote {name_of(config.out, slide_id)}: {count:,} cells")
    return 0


def _check_evaluation(uri: str | None, suffix: str) -> None:
    """Refuse an evaluation that cannot be used, before the work."""
    if uri is not None and suffix not in WITH_ACCURACY:
        message = (
            f"--evaluation {uri}: {suffix} has no place for accuracy; leave it out, or write one "
            f"of {', '.join(WITH_ACCURACY)}"
        )
        raise ValueError(message)
    if uri is not None:
        read_evaluation(uri)


def _with_absolute_paths(config: ExportConfig) -> ExportConfig:
    """Return the same settings for Ray's workers, which run in other folders."""
    evaluation = None if config.evaluation is None else storage.absolute(config.evaluation)
    run, out = storage.absolute(config.run), storage.absolute(config.out)
    return replace(config, run=run, out=out, evaluation=evaluation)


def suffix_of(out: str) -> str:
    """Return the longest known suffix of a name.

    Raises:
        ValueError: it has none.
    """
    found = [suffix for suffix in WRITERS if out.rstrip("/").endswith(suffix)]
    if not found:
        message = f"{out}: unknown format; end the name in one of {', '.join(WRITERS)}"
        raise ValueError(message)
    return max(found, key=len)


def name_of(out: str, slide_id: str) -> str:
    """Return the name of a slide's own file: `cells.h5ad` becomes `cells.P1.h5ad`."""
    out = out.rstrip("/")
    suffix = suffix_of(out)
    return f"{out.removesuffix(suffix)}.{slide_id}{suffix}"


def _export_slide(run: Run, config: ExportConfig, slide_id: str) -> int:
    """Export one slide to its own file; return its number of cells."""
    out = name_of(config.out, slide_id)
    _refuse_folder(out)
    return WRITERS[suffix_of(out)](run, config, out, [slide_id])


def _refuse_folder(out: str) -> None:
    """Refuse the name of a folder for a file, before the work; other writers know their own."""
    if (
        suffix_of(out) not in FOLDERS
        and storage.is_local(out)
        and Path(storage.resolve(out)[1]).is_dir()
    ):
        message = f"{out}: is a folder, and the export is a file; give another name"
        raise ValueError(message)


def _anndata(run: Run, config: ExportConfig, out: str, slides: list[str] | None) -> int:
    return write_anndata(
        run,
        out,
        slides,
        config.genes,
        picture_px=config.picture_px,
        outlines=config.outlines,
        evaluation=_evaluation(config),
    )


def _evaluation(config: ExportConfig) -> dict[str, Any] | None:
    return None if config.evaluation is None else read_evaluation(config.evaluation)


def _geojson(run: Run, config: ExportConfig, out: str, slides: list[str] | None) -> int:
    return write_geojson(run, out, _one_slide(run, out, slides, "GeoJSON"), _genes(run, config))


def _geopackage(run: Run, config: ExportConfig, out: str, slides: list[str] | None) -> int:
    return write_geopackage(run, out, run.choose(slides), _genes(run, config))


def _spatialdata(run: Run, config: ExportConfig, out: str, slides: list[str] | None) -> int:
    return write_spatialdata(
        run,
        out,
        slides,
        config.genes,
        picture_mpp=config.picture_mpp,
        evaluation=_evaluation(config),
    )


def _explorer(run: Run, config: ExportConfig, out: str, slides: list[str] | None) -> int:
    slide_id = _one_slide(run, out, slides, "a folder for Xenium Explorer")
    return write_explorer(run, out, slide_id, config.genes, picture_mpp=config.picture_mpp)


def _one_slide(run: Run, out: str, slides: list[str] | None, what: str) -> str:
    """Return the only slide that is chosen."""
    chosen = run.choose(slides)
    if len(chosen) != 1:
        message = (
            f"{out}: {what} holds one slide, and {len(chosen)} are chosen: name one with --slides,"
            " or give --per-slide for a file each"
        )
        raise ValueError(message)
    return chosen[0]


def _genes(run: Run, config: ExportConfig) -> list[str]:
    """Return the genes; none of a run of `extract`."""
    has_any = config.genes is not None or run.has_expression
    return run.choose_genes(config.genes) if has_any else []


WRITERS: dict[str, Writer] = {
    ".h5ad": _anndata,
    ".zarr": _anndata,
    ".sdata.zarr": _spatialdata,
    ".geojson": _geojson,
    ".geojson.gz": _geojson,
    ".gpkg": _geopackage,
    ".explorer": _explorer,
}
WITH_ACCURACY = (".h5ad", ".zarr", ".sdata.zarr")
FOLDERS = (".zarr", ".sdata.zarr", ".explorer")
