"""The command `export`."""

from rich.console import Console

from scellst_ray.commands.configs import ExportConfig
from scellst_ray.export.anndata import write_anndata
from scellst_ray.runs.reading import open_run


def run_export(config: ExportConfig) -> int:
    """Run `export`."""
    write_anndata(open_run(config.run), config.out, config.slides, config.genes)
    Console().print(f"wrote {config.out}", markup=False, soft_wrap=True)
    return 0
