"""Settings of the commands whose work loads Ray, torch or anndata; their help reads only these."""

from dataclasses import dataclass

from scellst_ray.core.numbers import check_numbers

# Crops in a step of the demo's pretraining.
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """Resume a run with its own settings, for all slides that are not done or some of them.

    Settings that are not given here are those of the run's config.yaml. None changes results.
    """

    run: str
    """Run folder of `extract` or `predict`. The name --run may be left out."""
    failed: bool = False
    """Process only slides that failed or are partial."""
    slides: list[str] | None = None
    """Comma-separated slide_ids to process. By default all that are not done."""
    manifest: str | None = None
    """Manifest, if it was moved. By default the file that the run read."""
    workers: int | None = None
    """Number of worker actors. By default as in the run."""
    gpus: bool | None = None
    """Run networks on GPUs. By default as in the run."""
    memory_gb: float | None = None
    """Memory in GB that a worker declares to Ray. By default as in the run. Raise it for tiles
    that failed for lack of memory."""
    max_attempts: int | None = None
    """Number of worker processes that a tile may end before it counts as failed. By default as in
    the run."""
    tile_timeout_s: float | None = None
    """Seconds that a tile may take. By default as in the run."""
    plan_timeout_s: float | None = None
    """Seconds that opening a slide and finding its tissue may take. By default as in the run."""

    def __post_init__(self) -> None:
        """Refuse two choices of slides, and numbers that cannot work."""
        low = {"workers": 1, "memory_gb": 0.1, "max_attempts": 1}
        check_numbers(self, low | {"tile_timeout_s": 1, "plan_timeout_s": 1})
        if self.failed and self.slides is not None:
            message = "failed and slides both choose slides; give one of them"
            raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export cells to AnnData, SpatialData, QuPath (GeoJSON), GIS tools or Xenium Explorer."""

    run: str
    """Run folder of `extract` or `predict`. The name --run may be left out."""
    out: str
    """File or folder to write. Its suffix decides the format: .h5ad or .zarr for AnnData (scanpy,
    squidpy; such a .zarr is no SpatialData store), .sdata.zarr for SpatialData (extra spatialdata),
    .geojson or .geojson.gz for QuPath, .gpkg for GIS tools (extra gis), .explorer for Xenium
    Explorer (extra explorer; expression times 100, in whole numbers). GeoJSON and .gpkg hold
    outlines in level-0 px, and y points down: GIS tools draw a slide upside down."""
    slides: list[str] | None = None
    """Comma-separated slide_ids to export. By default all that did not fail."""
    genes: list[str] | None = None
    """Comma-separated genes, in the order of the file's columns. By default the whole panel."""
    per_slide: bool = False
    """Write a file for each slide, by Ray if there are many: cells.h5ad becomes cells.P1.h5ad."""
    picture_px: int | None = None
    """AnnData only: longer side of each slide's picture, px; 0 for none. By default 1000 for up to
    20 slides, and none for more."""
    outlines: bool = False
    """AnnData only: add an image of the cells' outlines, as large as the picture, for squidpy's
    spatial_segment. The picture then has 1 um per px, and at most 8,000 px, by default."""
    evaluation: str | None = None
    """AnnData and SpatialData only: file of `evaluate expression`, for accuracy by gene in var."""
    picture_mpp: float | None = None
    """SpatialData and Xenium Explorer only: um per px of each slide's picture, rounded to a whole
    number of level-0 px; 0 for none (Xenium Explorer: a white one). By default 1, but in
    SpatialData of more than 20 slides none."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        check_numbers(self, {"picture_px": 0, "picture_mpp": 0})


@dataclass(frozen=True, kw_only=True)
class GenesConfig:
    """Write chosen genes of a run as Parquet columns, one file a slide."""

    run: str
    """Run folder of `predict`. The name --run may be left out."""
    genes: list[str]
    """Comma-separated genes."""
    out: str
    """Folder to write <slide_id>.parquet into: slide_id, cell_id and a float32 column per gene.
    Files that are there already are kept if they are of this run."""
    slides: list[str] | None = None
    """Comma-separated slide_ids. By default all that did not fail."""


@dataclass(frozen=True, kw_only=True)
class PseudobulkConfig:
    """Write one row per slide: mean expression, cell types and niches, for response models."""

    run: str
    """Run folder of `predict`. The name --run may be left out."""
    out: str
    """File to write, .h5ad: X holds the mean of each gene over the slide's cells."""
    manifest: str | None = None
    """Manifest whose further columns (patient_id, response, ...) become columns of `obs`."""
    slides: list[str] | None = None
    """Comma-separated slide_ids. By default all that did not fail."""
    radius_um: float = 30.0
    """Radius of a cell's neighbourhood, um. Columns near_A_B count cells of type B around a cell of
    type A. Larger values describe regions, smaller ones contacts."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        check_numbers(self, {"radius_um": 1})


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """Score every cell of a run for cell types by their marker genes; the run keeps the scores."""

    run: str
    """Run folder of `predict`. The name --run may be left out. Its `scores` folder is written."""
    markers: str | None = None
    """File of marker genes: CSV, .xlsx, JSON or YAML. A table has one column of genes for each
    type, or the columns type and gene."""
    reference: str | None = None
    """Single-cell reference, .h5ad, to take markers from instead: log-normalised expression or
    counts. It is read in blocks."""
    reference_key: str = "cell_type"
    """Column of the reference's obs that names the type of each cell."""
    markers_per_type: int = 20
    """Number of markers of each type of a reference: the genes of highest t, by a t-test with
    overestimated variance."""
    panel_markers: bool = False
    """Choose the markers of a reference among the run's genes. By default they are chosen among all
    genes, and those that the run lacks are left out."""
    scale: bool = True
    """Scale genes to mean 0 and variance 1 before scoring, as sCellST's paper does. Otherwise genes
    of high expression weigh more."""
    type_map: list[str] | None = None
    """Comma-separated TYPE=NUCLEUS_TYPE, such as T=Inflammatory,B=Inflammatory: nucleus types of
    the segmenter that scored types belong to, to compare them. By default those of one name."""

    def __post_init__(self) -> None:
        """Refuse no markers, two sources of markers, and numbers that cannot work."""
        check_numbers(self, {"markers_per_type": 1})
        if (self.markers is None) == (self.reference is None):
            message = "give either --markers FILE or --reference REF.h5ad"
            raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write a run as HTML pages: one for the cohort and one for each slide, without a network."""

    run: str
    """Run folder of `extract` or `predict`. The name --run may be left out. No slide is read."""
    out: str
    """Folder to write index.html and slides/<slide_id>.html into. Each page holds its pictures."""
    genes: list[str] | None = None
    """Comma-separated genes to show. By default the six whose variance by mean is highest."""
    slides: list[str] | None = None
    """Comma-separated slide_ids. By default all."""
    manifest: str | None = None
    """Manifest that names spots: pages show the measured spots next to the predicted cells."""
    evaluation: str | None = None
    """JSON file of `evaluate expression --out`: pages show accuracy and baselines."""
    beside: str | None = None
    """Folder of another run of the same slides, such as with another segmenter: pages show both
    side by side."""


@dataclass(frozen=True, kw_only=True)
class ManifestHestConfig:
    """Write a manifest for extract, train and predict from a folder in the HEST layout."""

    folder: str
    """Folder that holds st/<id>.h5ad, wsis/<id>.tif and metadata/<id>.json. For
    `--segmenter imported` it also holds cellvit_seg/<id>_cellvit_seg.parquet."""
    out: str
    """CSV file to write. It must not exist yet."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check this machine, the cluster and the files of a run before it starts."""

    job: str | None = None
    """YAML file of extract, predict, pretrain or train. The files it names are checked. Flags
    override it."""
    manifest: str | None = None
    """Manifest whose slides are checked, with the spots, segmentations and Xenium folders it names.
    Each must exist; those on local disks are opened, and read up to 500 MB."""
    out: str | None = None
    """Folder that every node must see and be able to write."""
    encoder: str | None = None
    """Encoder weights that every node must have."""
    segmenter_weights: str | None = None
    """CellViT checkpoint that must be complete and on every node: a file, or a name that
    `scellst-ray models` lists."""
    head: str | None = None
    """Head that must be readable: its folder or its file."""
    gpus: bool | None = None
    """Require that networks can run on GPUs. Give it if the run is to use GPUs."""
    ray: bool = True
    """Connect to Ray (or start it), count its CPUs and GPUs, and check every node."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Run all steps on two synthetic slides and compare the prediction with the truth."""

    out: str = "demo"
    """Folder to write: slides, runs, pictures, scores and the pages of a report."""
    size_um: float = 1800.0
    """Side of each slide in um, at least 500. Time grows with its square."""
    crops: int = 1024
    """Number of cell crops on which the encoder is pretrained, at least 64."""
    seed: int = 0
    """Seed of the synthetic slides."""

    def __post_init__(self) -> None:
        """Refuse slides too small to hold spots, and fewer crops than a step takes."""
        check_numbers(self)
        if self.size_um < 500:
            message = f"size_um is {self.size_um}; give at least 500, to get enough spots"
            raise ValueError(message)
        if self.crops < BATCH:
            message = f"crops is {self.crops}; give at least {BATCH}, a batch of pretraining"
            raise ValueError(message)
