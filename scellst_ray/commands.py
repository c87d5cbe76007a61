"""What each subcommand does: run the job, show it, turn the outcome into an exit code."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scellst_ray import domain_shift
from scellst_ray.crossvalidate import CrossvalidateConfig
from scellst_ray.crossvalidate_report import run_crossvalidate
from scellst_ray.demo import DemoConfig, demo
from scellst_ray.doctor import DoctorConfig, doctor
from scellst_ray.evaluate import EvaluateSegmentationConfig
from scellst_ray.evaluate_encoder import EvaluateEncoderConfig
from scellst_ray.evaluate_encoder_report import run_evaluate_encoder
from scellst_ray.evaluate_expression import EvaluateExpressionConfig
from scellst_ray.evaluate_expression_report import run_evaluate_expression
from scellst_ray.evaluate_report import run_evaluate_segmentation
from scellst_ray.export.anndata import write_anndata
from scellst_ray.manifest_hest import ManifestHestConfig, write_hest_manifest
from scellst_ray.models_command import ModelsConfig, ModelsFetchConfig, fetch_model, list_models
from scellst_ray.pipelines.cells import extract
from scellst_ray.pipelines.expression import PredictConfig, predict
from scellst_ray.pipelines.extract_config import ExtractConfig
from scellst_ray.plan import PlanConfig
from scellst_ray.plan_report import run_plan
from scellst_ray.pretrain import ENCODER_FILE, PretrainConfig, pretrain_encoder
from scellst_ray.progress import shown_progress
from scellst_ray.reading import open_run
from scellst_ray.retry import RetryConfig, retry
from scellst_ray.runs import FINISHED
from scellst_ray.simulate import SimulateConfig
from scellst_ray.simulate_report import run_simulate
from scellst_ray.status import StatusConfig, status
from scellst_ray.sweep import GcConfig, gc
from scellst_ray.train import TrainConfig, train

Job = tuple[type, Callable[[Any], int]]


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


def jobs() -> dict[str, Job]:
    """Return every command's configuration class and function, in the order of the help.

    A name may be two words: the first is then a group.
    """
    return {
        "extract": (ExtractConfig, run_extract),
        "pretrain": (PretrainConfig, run_pretrain),
        "train": (TrainConfig, run_train),
        "predict": (PredictConfig, run_predict),
        "plan": (PlanConfig, run_plan),
        "status": (StatusConfig, status),
        "retry": (RetryConfig, run_retry),
        "gc": (GcConfig, gc),
        "export": (ExportConfig, run_export),
        "evaluate segmentation": (EvaluateSegmentationConfig, run_evaluate_segmentation),
        "evaluate encoder": (EvaluateEncoderConfig, run_evaluate_encoder),
        "evaluate expression": (EvaluateExpressionConfig, run_evaluate_expression),
        "crossvalidate": (CrossvalidateConfig, run_crossvalidate),
        "simulate": (SimulateConfig, run_simulate),
        "manifest hest": (ManifestHestConfig, write_hest_manifest),
        "models": (ModelsConfig, list_models),
        "models fetch": (ModelsFetchConfig, fetch_model),
        "demo": (DemoConfig, demo),
        "doctor": (DoctorConfig, doctor),
    }


def run_extract(config: ExtractConfig) -> int:
    """Run `extract`; 0 only if every slide is done or empty."""
    with shown_progress() as report:
        records = extract(config, report)
    return summarise(records, config.out)


def run_predict(config: PredictConfig) -> int:
    """Run `predict`; 0 only if every slide is done or empty."""
    with shown_progress() as report:
        records = predict(config, report)
    return summarise(records, config.out)


def run_retry(config: RetryConfig) -> int:
    """Run `retry`; 0 only if every slide that it was about is done or empty."""
    with shown_progress() as report:
        records = retry(config, report)
    return summarise(records, config.run)


def run_pretrain(config: PretrainConfig) -> int:
    """Run `pretrain`."""
    console = Console()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    pretrain_encoder(config, say)
    say(f"encoder: {config.out}/{ENCODER_FILE}")
    return 0


def run_train(config: TrainConfig) -> int:
    """Run `train`."""
    console = Console()
    train(config, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True))
    console.print(f"head: {config.out}/head.safetensors", markup=False, soft_wrap=True)
    return 0


def run_export(config: ExportConfig) -> int:
    """Run `export`."""
    write_anndata(open_run(config.run), config.out, config.slides, config.genes)
    Console().print(f"wrote {config.out}", markup=False, soft_wrap=True)
    return 0


def summarise(records: dict[str, dict[str, Any]], out: str) -> int:
    """Print what became of the slides, with the reasons of failures; return the exit code."""
    console = Console()
    counts = dict.fromkeys(("done", "empty", "partial", "failed"), 0)
    for record in records.values():
        counts[record["status"]] += 1
    num_cells = sum(record["num_cells"] for record in records.values())
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    line = f"{len(records)} slides: {text}; {num_cells:,} cells in {out}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    for text in domain_shift.warnings(records):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    bad = {k: r for k, r in sorted(records.items()) if r["status"] not in FINISHED}
    if bad:
        table = Table("slide", "status", "tiles failed", "stage", title="not complete")
        table.add_column("reason", overflow="fold", min_width=24)
        for slide_id, record in bad.items():
            tiles = f"{record['num_failed_tiles']} of {max(1, record['num_tiles'] or 0)}"
            reason = f"{record['error_type']}: {record['error']}"
            table.add_row(slide_id, record["status"], tiles, record["stage"], escape(reason))
        console.print(table)
        console.print(
            "Mend the cause and run the same command again: it does only what is missing."
        )
    return 1 if bad else 0
