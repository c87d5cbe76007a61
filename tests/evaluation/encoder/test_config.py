"""Settings of `evaluate encoder`: what they refuse."""

import pytest

from scellst_ray.evaluation.encoder.config import EvaluateEncoderConfig


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, "give either manifest"),
        ({"manifest": "m", "run": "r"}, "give either manifest"),
        ({"manifest": "m", "slides": ["s"]}, "slides are those of run"),
        ({"run": "r", "queries": 0}, "queries is 0"),
        ({"run": "r", "also": ["tokens"]}, "'tokens' embeds no crops"),
    ],
)
def test_refuses(changes, part):
    with pytest.raises(ValueError, match=part):
        EvaluateEncoderConfig(encoder="random:0", **changes)
