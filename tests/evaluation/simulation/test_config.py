"""Settings of `simulate`: what they refuse."""

import pytest

from scellst_ray.evaluation.simulation.config import SimulateConfig


def test_the_search_uses_all_rates():
    search = SimulateConfig(learning_rates=[0.1, 0.01], max_epochs=3).search()
    assert list(search.learning_rates) == [0.1, 0.01]
    assert (search.config.lr, search.config.max_epochs) == (0.1, 3)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_types": 1}, "num_types is 1"),
        ({"spread": 0.0}, "spread is 0.0"),
        ({"learning_rates": []}, "learning_rates is empty"),
        ({"search_epochs": [5, 3]}, "ascending numbers"),
    ],
)
def test_refuses(changes, part):
    with pytest.raises(ValueError, match=part):
        SimulateConfig(**changes)
