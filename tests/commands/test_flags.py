"""Flags from the fields of settings: their types, defaults, help and order."""

from dataclasses import MISSING, dataclass, field
from inspect import Parameter

from scellst_ray.commands.flags import flags_of, signature_of
from scellst_ray.preflight.config import PlanConfig
from scellst_ray.stages.config import ExtractConfig, PredictConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings for a test."""

    count: int | None = None
    """A count, in
    two lines."""
    run: str
    """A run."""
    rates: list[float] = field(default_factory=lambda: [0.1])
    """Rates."""
    fast: bool = False
    """Whether it is fast."""


def test_fields_are_flags():
    flags = flags_of(Settings)
    assert list(flags) == ["count", "run", "rates", "fast"]
    assert flags["count"].text == "A count, in two lines."
    assert flags["run"].default is MISSING
    assert flags["rates"].default == [0.1]
    assert [name for name, flag in flags.items() if flag.is_optional] == ["count"]
    assert [name for name, flag in flags.items() if flag.is_switch] == ["fast"]


def test_a_run_stands_without_its_name_and_required_flags_come_first():
    flags = flags_of(Settings)
    signature = signature_of(flags, {"A": "run fast", "B": "count rates"}, hidden=())
    assert list(signature.parameters) == ["run", "fast", "count", "rates", "config"]
    kinds = {name: p.kind for name, p in signature.parameters.items()}
    assert kinds.pop("run") == Parameter.POSITIONAL_OR_KEYWORD
    assert set(kinds.values()) == {Parameter.KEYWORD_ONLY}


def test_settings_of_settings_are_flags_too():
    flags = flags_of(PlanConfig)
    jobs = flags_of(ExtractConfig) | flags_of(PredictConfig)
    assert set(jobs) < set(flags)
    assert "job" not in flags
    # The plan's own wins: it is a number here.
    assert flags["gpus"].kind == bool | int | None
    # extract and predict have other defaults, and only predict has a head.
    assert [flags[name].default for name in ("encoder", "store_embeddings", "head")] == [None] * 3
    assert flags["manifest"].default is MISSING
    assert flags["core_px"].default == ExtractConfig(manifest="m", out="o").core_px


def test_inherited_fields_keep_their_help():
    assert flags_of(PredictConfig)["manifest"].text == flags_of(ExtractConfig)["manifest"].text
