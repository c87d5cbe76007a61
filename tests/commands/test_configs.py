"""What settings refuse."""

import pytest

from scellst_ray.commands.configs import DemoConfig, RetryConfig


@pytest.mark.parametrize(
    ("wrong", "part"),
    [({"size_um": 499.0}, "size_um is 499.0"), ({"crops": 63}, "crops is 63; give at least 64")],
)
def test_a_demo_too_small(wrong, part):
    with pytest.raises(ValueError, match=part):
        DemoConfig(**wrong)


def test_retry_takes_one_choice_of_slides():
    with pytest.raises(ValueError, match="failed and slides both choose slides"):
        RetryConfig(run="a", failed=True, slides=["s"])
