"""What each subcommand does: run the job, show it, turn the outcome into an exit code."""

from collections.abc import Callable
from typing import Any

from scellst_ray.commands.crossvalidate import CrossvalidateConfig
from scellst_ray.commands.crossvalidate_report import run_crossvalidate
from scellst_ray.commands.demo import DemoConfig, demo
from scellst_ray.commands.doctor import DoctorConfig, doctor
from scellst_ray.commands.evaluate_encoder import run_evaluate_encoder
from scellst_ray.commands.evaluate_expression import run_evaluate_expression
from scellst_ray.commands.evaluate_segmentation import run_evaluate_segmentation
from scellst_ray.commands.export import ExportConfig, run_export
from scellst_ray.commands.extract import run_extract
from scellst_ray.commands.gc import GcConfig, gc
from scellst_ray.commands.manifest_hest import ManifestHestConfig, write_hest_manifest
from scellst_ray.commands.models import ModelsConfig, ModelsFetchConfig, fetch_model, list_models
from scellst_ray.commands.plan import run_plan
from scellst_ray.commands.predict import run_predict
from scellst_ray.commands.pretrain import (
    PretrainConfig,
    run_pretrain,
)
from scellst_ray.commands.retry import RetryConfig, run_retry
from scellst_ray.commands.simulate import run_simulate
from scellst_ray.commands.status import StatusConfig, status
from scellst_ray.commands.train import TrainConfig, run_train
from scellst_ray.evaluation.encoder.evaluate import EvaluateEncoderConfig
from scellst_ray.evaluation.expression.evaluate import EvaluateExpressionConfig
from scellst_ray.evaluation.segmentation.evaluate import EvaluateSegmentationConfig
from scellst_ray.evaluation.simulation.study import SimulateConfig
from scellst_ray.preflight.plan import PlanConfig
from scellst_ray.stages.config import ExtractConfig, PredictConfig

Job = tuple[type, Callable[[Any], int]]


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
