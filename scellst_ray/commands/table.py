"""The table of commands: it names the modules that hold the settings and the work of each.

The help of all commands reads this table alone, so it needs neither torch nor Ray.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

RUNS, TRAINING, SCORES, OTHERS = "Runs", "Training", "Scores", "Set-up"

# Groups of flags that several commands share, as the help of a command shows them.
WORKERS = "workers gpus memory_gb"
RETRIES = "max_attempts tile_timeout_s plan_timeout_s"
OF_EXTRACT = {
    "Input and output": "manifest out slides moved",
    "Nuclei": "segmenter segmenter_weights segmenter_window_px",
    "Tiles": "read_mpp core_px halo_px",
    "Embedding": "encoder colours_from precision store_embeddings",
    "Crops": "crops crops_per_slide crops_per_type crops_seed",
    "Resources": f"{WORKERS} tiles_per_task {RETRIES}",
}
OF_PREDICT = OF_EXTRACT | {"Input and output": "manifest out head slides moved"}
OF_HEADS = {
    "Spots and genes": "min_gene_counts min_spot_share min_spot_counts keep_mitochondrial "
    "check_alignment",
    "Head": "predictor ensemble",
    "Fit": "learning_rate weight_decay batch_spots max_epochs patience val_share",
}


@dataclass(frozen=True)
class Command:
    """A command of `scellst-ray`.

    Attributes:
        settings: Dataclass whose fields are the flags, as "module:class" within the package.
        work: Function that takes the settings and returns the exit code, as "module:function".
        about: What the command does, in a line: the first line of the class's docstring.
        section: Heading of the command in the list of all.
        example: A command line to start from.
        groups: Names of flags by the heading that the help shows them under.
        hidden: Flags that are accepted but not shown.
        is_light: Whether the work runs without pandas.
    """

    settings: str
    work: str
    about: str
    section: str
    example: str
    groups: Mapping[str, str] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    is_light: bool = False

    def load_settings(self) -> type[Any]:
        """Import the dataclass of the settings."""
        found: type[Any] = load(self.settings)
        return found

    def load_work(self) -> Callable[[Any], int]:
        """Import the function that does the work."""
        found: Callable[[Any], int] = load(self.work)
        return found


def load(target: str) -> Any:  # noqa: ANN401 - whatever the target names
    """Import what "module:name" names, the module relative to the package."""
    module, _, name = target.partition(":")
    return getattr(import_module(f"scellst_ray.{module}"), name)


# Help of each first word that several commands of two words share.
GROUPS = {
    "evaluate": "Score results. Subcommands: segmentation, encoder, expression.",
    "manifest": "Write a manifest from a folder of a public layout. Subcommand: hest.",
}

COMMANDS = {
    "extract": Command(
        "stages.config:ExtractConfig",
        "commands.extract:run_extract",
        "Write CELLS of slides: every nucleus with its outline and embedding.",
        RUNS,
        "scellst-ray extract --manifest slides.csv --out runs/cells",
        OF_EXTRACT,
    ),
    "predict": Command(
        "stages.config:PredictConfig",
        "commands.predict:run_predict",
        "Write CELLS and EXPRESSION of slides in one pass, without transcriptomics.",
        RUNS,
        "scellst-ray predict --manifest slides.csv --head head --out runs/expression",
        OF_PREDICT,
    ),
    "plan": Command(
        "preflight.config:PlanConfig",
        "commands.plan:run_plan",
        "Estimate tiles, cells, bytes, hours and price of a run of extract or predict.",
        RUNS,
        "scellst-ray plan --config predict.yaml --gpus 8 --gpu-price 2.5",
        {
            "Input and output": "manifest head slides json",
            "Cluster": "cpus gpus workers memory_gb cpu_price gpu_price",
            "Rates": "calibrate from_run processes",
            **{name: OF_EXTRACT[name] for name in ("Nuclei", "Tiles", "Embedding", "Crops")},
            "Tasks": f"tiles_per_task {RETRIES}",
        },
        # Part of a job's file, which is taken as it is; a plan writes no run folder.
        hidden=("out", "moved"),
    ),
    "status": Command(
        "commands.status:StatusConfig",
        "commands.status:status",
        "Show the progress of a run from its folder: slides by status, speed, time left, failures.",
        RUNS,
        "scellst-ray status runs/cells",
        {"Flags": "run json write"},
        is_light=True,
    ),
    "retry": Command(
        "commands.configs:RetryConfig",
        "commands.retry:run_retry",
        "Resume a run with its own settings, for all slides that are not done or some of them.",
        RUNS,
        "scellst-ray retry runs/cells --failed --memory-gb 4",
        {
            "Input": "run failed slides manifest",
            "Resources": f"{WORKERS} {RETRIES}",
        },
    ),
    "gc": Command(
        "commands.gc:GcConfig",
        "commands.gc:gc",
        "Remove what crashes left in a run folder: orphan shards, temporary files, notes.",
        RUNS,
        "scellst-ray gc runs/cells --dry-run",
        {"Flags": "run dry_run"},
        is_light=True,
    ),
    "verify": Command(
        "commands.verify:VerifyConfig",
        "commands.verify:verify",
        "Read all files of a run and list those that are damaged, missing or exchanged.",
        RUNS,
        "scellst-ray verify runs/cells",
        {"Flags": "run json"},
        is_light=True,
    ),
    "export": Command(
        "commands.configs:ExportConfig",
        "commands.export:run_export",
        "Export cells to AnnData, SpatialData, QuPath (GeoJSON), GIS tools or Xenium Explorer.",
        RUNS,
        "scellst-ray export runs/expression --out cells.h5ad --slides P1,P2",
        {
            "Flags": "run out slides genes per_slide",
            "What further goes in": "evaluation picture_px outlines picture_mpp",
        },
    ),
    "genes": Command(
        "commands.configs:GenesConfig",
        "commands.genes:run_genes",
        "Write chosen genes of a run as Parquet columns, one file a slide.",
        RUNS,
        "scellst-ray genes runs/expression --genes CD3E,EPCAM --out genes",
        {"Flags": "run genes out slides"},
    ),
    "pseudobulk": Command(
        "commands.configs:PseudobulkConfig",
        "commands.pseudobulk:run_pseudobulk",
        "Write one row per slide: mean expression, cell types and niches, for response models.",
        RUNS,
        "scellst-ray pseudobulk runs/expression --out slides.h5ad --manifest m.csv",
        {"Flags": "run out manifest slides radius_um"},
    ),
    "annotate": Command(
        "commands.configs:AnnotateConfig",
        "commands.annotate:run_annotate",
        "Score every cell of a run for cell types by their marker genes; the run keeps the scores.",
        RUNS,
        "scellst-ray annotate runs/expression --markers markers.csv",
        {
            "Input": "run markers reference reference_key markers_per_type panel_markers",
            "Scores": "scale type_map",
        },
    ),
    "report": Command(
        "commands.configs:ReportConfig",
        "commands.report:run_report",
        "Write a run as HTML pages: one for the cohort and one for each slide, without a network.",
        RUNS,
        "scellst-ray report runs/expression --out report --genes CD3E,EPCAM",
        {"Flags": "run out genes slides manifest evaluation beside"},
    ),
    "pretrain": Command(
        "commands.training_configs:PretrainConfig",
        "commands.pretrain:run_pretrain",
        "Pretrain an encoder on crops of cells by contrastive learning (MoCo v3).",
        TRAINING,
        "scellst-ray pretrain --crops runs/crops --out encoder --gpus",
        {
            "Input and output": "crops out init",
            "Network": "arch projector_dim out_dim temperature momentum momentum_cosine",
            "Optimisation": "epochs warmup_epochs batch base_lr optimiser weight_decay seed",
            "Views": "flips stain_jitter hue min_crop_scale",
            "Resources": "workers min_workers cpus_per_worker gpus crops_at_once precision "
            "recompute",
            "Checkpoints": "checkpoint_steps keep_best max_failures",
        },
    ),
    "train": Command(
        "commands.training_configs:TrainConfig",
        "commands.train:run_train",
        "Train a head on CELLS and spots to predict expression (multiple-instance learning).",
        TRAINING,
        "scellst-ray train --manifest spots.csv --cells runs/cells --out head",
        {
            "Input and output": "manifest cells out slides",
            "Spots and genes": f"genes {OF_HEADS['Spots and genes']}",
            "Head": f"{OF_HEADS['Head']} loss",
            "Fit": f"{OF_HEADS['Fit']} seed",
            "Resources": "workers cpus_per_worker gpus memory_gb max_failures",
        },
    ),
    "crossvalidate": Command(
        "commands.training_configs:CrossvalidateConfig",
        "commands.crossvalidate_report:run_crossvalidate",
        "Train heads on some slides, score them on other slides, over panels, losses and seeds.",
        TRAINING,
        "scellst-ray crossvalidate --manifest spots.csv --cells runs/cells --out cv",
        {
            "Input and output": "manifest cells out slides",
            "Trials": "protocol panels losses num_seeds colour bootstraps",
            **OF_HEADS,
            "Resources": "cpus_per_trial gpus_per_trial",
        },
    ),
    "evaluate segmentation": Command(
        "evaluation.segmentation.config:EvaluateSegmentationConfig",
        "commands.evaluate_segmentation:run_evaluate_segmentation",
        "Score nuclei against annotations: F1, PQ and AJI of masks, F1 of points and their types.",
        SCORES,
        "scellst-ray evaluate segmentation runs/cells --slide P1 --truth P1.png",
        {
            "Input and output": "truth predicted run slide manifest out",
            "Frame": "mpp truth_mpp region radius_um",
            "Types": "types truth_types predicted_types",
        },
    ),
    "evaluate encoder": Command(
        "evaluation.encoder.config:EvaluateEncoderConfig",
        "commands.evaluate_encoder:run_evaluate_encoder",
        "Score an encoder on cell types: linear probe, neighbours, batch effect and a gallery.",
        SCORES,
        "scellst-ray evaluate encoder runs/cells --encoder imagenet --out report",
        {
            "Input and output": "encoder also manifest run slides out",
            "Cells": "drop_types max_cells neighbours queries seed",
            "Resources": "precision gpus",
        },
    ),
    "evaluate expression": Command(
        "evaluation.expression.config:EvaluateExpressionConfig",
        "commands.evaluate_expression:run_evaluate_expression",
        "Score predicted expression on spots or cells: PCC, SCC, rMSE, MAE and three baselines.",
        SCORES,
        "scellst-ray evaluate expression run --manifest b.csv --train-manifest a.csv",
        {
            "Input and output": "run manifest train_manifest slides out",
            "Scores": "colour radius_um bootstraps seed",
        },
    ),
    "simulate": Command(
        "evaluation.simulation.config:SimulateConfig",
        "commands.simulate:run_simulate",
        "Repeat the simulation study of sCellST's paper: how much spots teach about single cells.",
        SCORES,
        "scellst-ray simulate --out simulation --reference pbmc",
        {
            "Input and output": "out cells slides reference reference_types",
            "Cells": "max_cells embedding_dim spread num_types cells_per_cluster",
            "Spots and genes": "num_spots cells_per_spot num_variable num_markers",
            "Fit": "learning_rates search_epochs max_epochs patience val_share predictor seed",
        },
    ),
    "manifest hest": Command(
        "commands.configs:ManifestHestConfig",
        "commands.manifest_hest:write_hest_manifest",
        "Write a manifest for extract, train and predict from a folder in the HEST layout.",
        OTHERS,
        "scellst-ray manifest hest --folder hest_data --out hest.csv",
        {"Flags": "folder out"},
    ),
    "models": Command(
        "commands.models:ModelsConfig",
        "commands.models:list_models",
        "List published weights: kind, licence and source, and whether this machine has them.",
        OTHERS,
        "scellst-ray models",
    ),
    "models fetch": Command(
        "commands.models:ModelsFetchConfig",
        "commands.models:fetch_model",
        "Download published weights into this machine's cache, checked against a known digest.",
        OTHERS,
        "scellst-ray models fetch resnet50-imagenet",
        {"Flags": "name url sha256"},
    ),
    "demo": Command(
        "commands.configs:DemoConfig",
        "commands.demo:demo",
        "Run all steps on two synthetic slides and compare the prediction with the truth.",
        OTHERS,
        "scellst-ray demo --out demo",
        {"Flags": "out size_um crops seed"},
    ),
    "doctor": Command(
        "commands.configs:DoctorConfig",
        "commands.doctor:doctor",
        "Check this machine, the cluster and the files of a run before it starts.",
        OTHERS,
        "scellst-ray doctor --job predict.yaml",
        {
            "Input and output": "job manifest out",
            "Models": "encoder segmenter_weights head",
            "Resources": "gpus ray",
        },
    ),
}


def begins_others(name: str) -> bool:
    """Return whether a word begins commands of two words."""
    return any(other.startswith(f"{name} ") for other in COMMANDS)
