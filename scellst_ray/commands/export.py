"""The command `export`."""

from dataclasses import dataclass

from rich.console import Console

from scellst_ray.export.anndata import write_anndata
from scellst_ray.runs.reading import open_run


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Cells of a run to one AnnData file that scanpy and squidpy open."""

    run: str
    """Run folder of `extract` or `predict`."""
    out: str
    """File to write: .h5ad or .zarr."""
    slides: list[str] | None = None
    """slide_ids (a,b); by default all that have cells."""
    genes: list[str] | None = None
    """Genes (a,b), in the order wanted; by default the whole panel."""


def run_export(config: ExportConfig) -> int:
    """Run `export`."""
    write_anndata(open_run(config.run), config.out, config.slides, config.genes)
    Console().print(f"wrote {config.out}", markup=False, soft_wrap=True)
    return 0
