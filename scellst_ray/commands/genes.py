"""The command `genes`: genes of all slides as Parquet columns."""

from functools import partial

from scellst_ray import storage
from scellst_ray.commands.configs import GenesConfig
from scellst_ray.commands.reports import line_printer
from scellst_ray.export.genes import check_folder, is_written, write_genes
from scellst_ray.pipelines.over_slides import over_slides, values_of
from scellst_ray.runs.reading import Run, open_run


def run_genes(config: GenesConfig) -> int:
    """Run `genes`; return 0.

    Raises:
        ValueError: slides, genes or the output cannot be used, or some slides failed.
    """
    # Absolute, since Ray's workers run in other folders.
    run, out, say = (
        open_run(storage.absolute(config.run)),
        storage.absolute(config.out),
        line_printer(),
    )
    genes = run.choose_genes(config.genes)
    check_folder(run, out, genes)
    chosen = [s for s in run.choose(config.slides) if run.records[s]["num_cells"]]
    missing = [s for s in chosen if not is_written(run, out, s)]
    results = over_slides(partial(_write, run, out, genes), missing)
    count = sum(count for _, count in values_of(results, "written"))
    kept = len(chosen) - len(missing)
    before = f", {kept} were there before" if kept else ""
    say(f"wrote {len(missing)} slide(s) into {config.out}: {count:,} cells{before}")
    return 0


def _write(run: Run, out: str, genes: list[str], slide_id: str) -> int:
    return write_genes(run, out, slide_id, genes)
