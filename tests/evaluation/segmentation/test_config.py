"""Settings of `evaluate segmentation`: regions, names of types, what they refuse."""

import pytest

from scellst_ray.evaluation.segmentation.config import EvaluateSegmentationConfig, parse_region

FILES = {"truth": "t.png", "predicted": "p.png"}


def test_regions_and_types():
    assert parse_region(None) is None
    assert parse_region("1,2") == [1.0, 2.0]
    assert parse_region("-1, 2.5;30 40") == [-1.0, 2.5, 30.0, 40.0]
    config = EvaluateSegmentationConfig(**FILES, types=["a=B", " c = "])
    assert config.same_types() == [("a", "B"), ("c", "")]


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({}, "give either truth"),
        ({"truth": "t"}, "nothing to score"),
        (FILES | {"run": "r"}, "either predicted or run"),
        ({"truth": "t", "run": "r"}, "truth of a run needs slide"),
        (FILES | {"radius_um": 0.0}, "radius_um is 0.0"),
        (FILES | {"out": "a.txt"}, "must end in .json or .csv"),
        (FILES | {"types": ["a"]}, "types has 'a'"),
        (FILES | {"region": "1,2,3"}, "region is '1,2,3'"),
    ],
)
def test_refuses(settings, part):
    with pytest.raises(ValueError, match=part):
        EvaluateSegmentationConfig(**settings)
