"""Calls in other processes give all results, even if an item ends its process."""

import os
import time

import pytest

from scellst_ray.core.isolated import WAITING, ProcessDeath, map_isolated


def square(number):
    return number * number


def work(number):
    """Square, crash, or hang."""
    if number == 3:
        os._exit(1)
    if number == 5:
        time.sleep(600)
    return number * number


def refuse(number):
    message = f"not {number}"
    raise ValueError(message)


def test_what_ends_its_process_or_hangs_costs_no_other_item_anything():
    found = dict(map_isolated(work, range(8), processes=2, timeout_s=2))
    assert set(found) == set(range(8))
    died = {item for item, result in found.items() if isinstance(result, ProcessDeath)}
    assert died == {3, 5}
    assert "took longer than 2 s" in found[5].reason
    assert all(found[item] == item * item for item in found if item not in died)


def test_items_are_taken_only_as_they_are_needed():
    taken = []
    results = map_isolated(square, (taken.append(n) or n for n in range(1000)), processes=1)
    assert next(results)[1] in {0, 1}
    assert len(taken) <= 2 * WAITING
    results.close()


def test_no_items_and_errors():
    assert list(map_isolated(square, [], processes=1)) == []
    with pytest.raises(ValueError, match="not 1"):
        list(map_isolated(refuse, [1], processes=1))
