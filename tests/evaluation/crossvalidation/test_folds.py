"""Folds by protocol."""

import pytest

from scellst_ray.evaluation.crossvalidation.folds import Fold, make_folds


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("leave-one-slide-out", [("a", "bc", "a"), ("b", "ac", "b"), ("c", "ab", "c")]),
        ("single-slide", [("a", "a", "bc"), ("b", "b", "ac"), ("c", "c", "ab")]),
        ("leave-one-patient-out", [("P", "b", "ac"), ("Q", "ac", "b")]),
    ],
)
def test_folds(protocol, expected):
    folds = make_folds(protocol, {"a": "P", "b": "Q", "c": "P"})
    assert [(f.name, "".join(f.train), "".join(f.test)) for f in folds] == expected


@pytest.mark.parametrize(
    ("protocol", "patients", "words"),
    [
        ("leave-one-slide-out", {"a": "P"}, "1 slides with spots"),
        ("leave-one-patient-out", {"a": "P", "b": None}, r"slides \['b'\] have none"),
        ("leave-one-patient-out", {"a": "P", "b": "P"}, "all slides are of P"),
    ],
)
def test_folds_that_cannot_be_are_refused(protocol, patients, words):
    with pytest.raises(ValueError, match=words):
        make_folds(protocol, patients)


@pytest.mark.parametrize(
    "protocol", ["leave-one-slide-out", "leave-one-patient-out", "single-slide"]
)
def test_slides_and_folds_keep_the_order_of_the_manifest(protocol):
    """The folds equal those of a plain loop over groups in the order of their first slide."""
    patients = {f"s{n}": f"patient {n * 7 % 4}" for n in (9, 3, 12, 0, 5, 1, 8, 2)}
    groups = patients if protocol == "leave-one-patient-out" else {s: s for s in patients}
    expected = []
    for name in dict.fromkeys(groups.values()):
        members = tuple(s for s in patients if groups[s] == name)
        others = tuple(s for s in patients if groups[s] != name)
        pair = (members, others) if protocol == "single-slide" else (others, members)
        expected.append(Fold(name, *pair))
    assert make_folds(protocol, patients) == expected
