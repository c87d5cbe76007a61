"""The command `pseudobulk`: slides x genes for survival and response models."""

import logging
from functools import partial

from scellst_ray import storage
from scellst_ray.commands.configs import PseudobulkConfig
from scellst_ray.commands.reports import line_printer
from scellst_ray.export.pseudobulk import (
    SlideBulk,
    check_out,
    make_pseudobulk,
    slide_bulk,
    slides_with_cells,
    write_pseudobulk,
)
from scellst_ray.pipelines.over_slides import over_slides, values_of
from scellst_ray.runs.reading import Run, open_run
from scellst_ray.slides.manifest import PATH_COLUMNS, read_manifest

logger = logging.getLogger(__name__)


def run_pseudobulk(config: PseudobulkConfig) -> int:
    """Run `pseudobulk`; return 0.

    Raises:
        ValueError: the run, the manifest or the output cannot be used, or some slides failed. Then
            nothing is written: a table without them would look whole.
    """
    check_out(config.out)
    # Absolute, since Ray's workers run in other folders.
    run, say = open_run(storage.absolute(config.run)), line_printer()
    run.choose_genes()  # a run without a head is refused before any work
    columns = {}
    if config.manifest is not None:
        columns = {
            slide.slide_id: {k: v for k, v in slide.columns.items() if k not in PATH_COLUMNS}
            for slide in read_manifest(config.manifest)
        }
    chosen, empty = slides_with_cells(run, config.slides)
    failed = sorted(s for s, r in run.records.items() if r["status"] == "failed")
    for reason, slides in (("have no cells", empty), ("failed", failed)):
        if slides and (config.slides is None or reason == "have no cells"):
            names = ", ".join(slides[:10]) + (" ..." if len(slides) > 10 else "")
            logger.warning("%d slide(s) %s and are left out: %s", len(slides), reason, names)
    missing = [slide for slide in chosen if config.manifest and slide not in columns]
    if missing:
        message = f"{config.manifest}: lacks slide {missing[0]!r} ({len(missing)} such slides)"
        raise ValueError(message)
    results = over_slides(partial(_bulk, run, config.radius_um), chosen)
    bulks = dict(values_of(results, "summed up"))
    adata = make_pseudobulk(run, bulks, columns, config.radius_um)
    write_pseudobulk(adata, config.out)
    say(f"wrote {config.out}: {adata.n_obs} slides x {adata.n_vars} genes")
    return 0


def _bulk(run: Run, radius_um: float, slide_id: str) -> SlideBulk:
    return slide_bulk(run, slide_id, radius_um)
