"""The command `export`."""

from scellst_ray.commands.configs import ExportConfig
from scellst_ray.commands.reports import line_printer
from scellst_ray.export.anndata import write_anndata
from scellst_ray.runs.reading import open_run


def run_export(config: ExportConfig) -> int:
    """Run `export`; return 0."""
    write_anndata(open_run(config.run), config.out, config.slides, config.genes)
    line_printer()(f"wrote {config.out}")
    return 0
