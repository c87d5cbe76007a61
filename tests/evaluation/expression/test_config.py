"""Settings of `evaluate expression`: what they refuse."""

import pytest

from scellst_ray.evaluation.expression.config import EvaluateExpressionConfig

FILES = {"run": "r", "manifest": "m", "train_manifest": "t"}


def test_draws():
    draws = EvaluateExpressionConfig(**FILES, bootstraps=7, seed=3).bootstrap()
    assert tuple(vars(draws).values()) == (7, 3)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"radius_um": 0.0}, "radius_um is 0.0"),
        ({"bootstraps": -1}, "bootstraps is -1; it must be at least 0"),
        ({"out": "a.md"}, "must end in .json"),
    ],
)
def test_refuses(changes, part):
    with pytest.raises(ValueError, match=part):
        EvaluateExpressionConfig(**FILES, **changes)
