import pytest

from scellst_ray.core.names import check_names

GENES = ["ACTB", "EPCAM", "ERBB2", "PTPRC", "VIM", "CD3E"]


def test_known_names_come_back_in_their_order():
    assert check_names(["VIM", "ACTB"], GENES, "genes") == ["VIM", "ACTB"]
    assert check_names("VIM", GENES, "genes") == ["VIM"]
    assert check_names([], GENES, "genes") == []


def test_unknown_names_are_refused_with_similar_ones():
    with pytest.raises(ValueError, match=r"^genes: 2 of 3 not found, such as 'EPCAN', 'X'; did "):
        check_names(["EPCAN", "X", "VIM"], GENES, "genes")
    with pytest.raises(ValueError, match=r"did you mean 'EPCAM'\? \(6 exist: 'ACTB', .*, \.\.\.\)"):
        check_names(["EPCAN"], GENES, "genes")
    with pytest.raises(ValueError, match=r"'a' \(0 exist: none\)"):
        check_names("a", [], "genes")


def test_only_five_unknown_names_are_shown():
    with pytest.raises(ValueError, match="7 of 7 not found") as caught:
        check_names([f"gene{number}" for number in range(7)], GENES, "genes")
    assert "'gene4'" in str(caught.value)
    assert "'gene5'" not in str(caught.value)


def test_a_repeated_name_is_refused():
    with pytest.raises(ValueError, match=r"genes: \['VIM'\] named more than once; name each once"):
        check_names(["VIM", "ACTB", "VIM"], GENES, "genes")
