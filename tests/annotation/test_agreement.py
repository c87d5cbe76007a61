from collections import Counter

import pytest

from scellst_ray.annotation.agreement import (
    accuracy,
    agreement_table,
    parse_type_map,
    same_names,
    shares,
)

COUNTS = {
    "a": Counter({("Inflammatory", "T"): 6, ("Inflammatory", "tumour"): 2, ("Dead", "T"): 5}),
    "b": Counter(
        {
            ("Inflammatory", "B"): 1,
            ("Inflammatory", None): 1,
            ("Neoplastic", "tumour"): 30,
            ("Neoplastic", "B"): 10,
        }
    ),
}
MAP = {"T": "Inflammatory", "B": "Inflammatory", "tumour": "Neoplastic"}


def test_the_table_has_a_row_for_each_slide_and_pair():
    table = agreement_table(COUNTS, "d")
    assert table["n"].to_pylist() == [5, 6, 2, 1, 1, 10, 30]
    assert sum(table["n"].to_pylist()) == 55
    assert table.schema.metadata[b"scellst_ray.table"] == b"AGREEMENT"


def test_balanced_accuracy_is_the_mean_of_recalls():
    found = accuracy(agreement_table(COUNTS, "d"), MAP)
    assert found.recall == {"Inflammatory": 7 / 10, "Neoplastic": 30 / 40}
    assert found.balanced == pytest.approx(0.725)
    assert found.chance == 0.5
    assert found.num_cells == 50  # dead cells belong to no scored type


def test_fewer_than_two_nucleus_types_are_not_compared():
    table = agreement_table(COUNTS, "d")
    assert accuracy(table, {}) is None
    assert accuracy(table, {"T": "Inflammatory"}) is None
    assert accuracy(agreement_table({}, "d"), MAP) is None


def test_types_of_one_name_belong_together():
    assert same_names(["T", "neoplastic"], ["Inflammatory", "Neoplastic"]) == {
        "neoplastic": "Neoplastic"
    }


def test_a_map_of_types():
    assert parse_type_map(["T=Inflammatory", " B = Inflammatory "], ["T", "B"]) == {
        "T": "Inflammatory",
        "B": "Inflammatory",
    }
    for words, message in (
        (["T"], "'T' is no pair"),
        (["=Neoplastic"], "is no pair"),
        (["X=Neoplastic"], "'X'"),
        (["T=a", "T=b"], "more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_type_map(words, ["T", "B"])


def test_shares_of_each_nucleus_type():
    assert shares(agreement_table(COUNTS, "d"), ["T", "B", "tumour"]) == [
        ["Dead", "5", "100.0%", "0.0%", "0.0%"],
        ["Inflammatory", "10", "60.0%", "10.0%", "20.0%"],
        ["Neoplastic", "40", "0.0%", "25.0%", "75.0%"],
    ]
