"""Numbers of settings that are none are refused, whoever makes the settings."""

import math
from dataclasses import dataclass, field

import pytest

from scellst_ray.core.numbers import check_numbers


@dataclass(frozen=True)
class Settings:
    name: str = "inf"
    on: bool = False
    size: float = 1.0
    count: int | None = None
    either: bool | int | None = True
    rates: list[float] = field(default_factory=list)


def test_values_that_work_pass():
    check_numbers(Settings())
    check_numbers(Settings(size=3, count=0, either=2, rates=[0.1, 5]), {"count": 0}, ["size"])
    check_numbers(Settings(count=-5), {"count": -5})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"size": math.inf}, "size is inf; it must be a finite number"),
        ({"size": math.nan}, "size is nan; it must be a finite number"),
        ({"size": "1.0"}, "size is 1.0; it must be a finite number"),
        ({"size": 0.0}, "size is 0.0; it must be greater than 0"),
        ({"count": 1}, "count is 1; it must be at least 2"),
        ({"count": 2**63}, "count is an integer of 64 bits; it must be a number of at most 64"),
        ({"count": 10**5000}, "count is an integer of 16,610 bits"),
        ({"either": -1}, "either is -1; it must be at least 0"),
        ({"rates": [1.0, math.nan]}, "rates is .1.0, nan.; it must be a finite number"),
        ({"rates": [1.0, -1.0]}, "rates is .*; it must be at least 0"),
        ({"size": "9" * 5000}, r"size is 9{77}\.\.\.; it must be a finite number"),
    ],
)
def test_values_that_do_not_are_named(changes, expected):
    with pytest.raises(ValueError, match=expected):
        check_numbers(Settings(**changes), {"count": 2}, positive=["size"])
