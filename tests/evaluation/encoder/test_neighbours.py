import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scellst_ray.evaluation.encoder.neighbours import neighbours, purity, unit

TYPES = np.array(["a", "b", "c"])


def made(seed=0, num=180, num_slides=4, signal=1.5, shift=1.0, dim=6):
    """Return embeddings that depend on type and slide, the types and the slides."""
    rng = np.random.default_rng(seed)
    type_N = rng.choice(3, num, p=(0.6, 0.3, 0.1))
    slide_N = rng.integers(num_slides, size=num)
    x_ND = rng.normal(size=(num, dim))
    x_ND += signal * np.eye(3, dim)[type_N] + shift * rng.normal(size=(num_slides, dim))[slide_N]
    return x_ND.astype(np.float32), TYPES[type_N], np.char.add("s", slide_N.astype(str))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(2, 40), st.integers(1, 12), st.booleans(), st.integers(0, 9))
def test_neighbours_equal_a_full_sort(num_queries, num_keys, k, labelled, seed):
    rng = np.random.default_rng(seed)
    queries, keys = unit(rng.normal(size=(num_queries, 4))), unit(rng.normal(size=(num_keys, 4)))
    labels = rng.integers(3, size=num_queries), rng.integers(3, size=num_keys)
    near = neighbours(queries, keys, k, labels if labelled else None)
    allowed = [np.flatnonzero((labels[1] != label) | (not labelled)) for label in labels[0]]
    assert near.shape == (num_queries, min(k, *map(len, allowed)))
    for query, row, candidates in zip(queries, near, allowed, strict=True):
        order = candidates[np.argsort(-(keys[candidates] @ query))]
        np.testing.assert_array_equal(row, order[: len(row)])


def test_purity_cell_by_cell():
    x_ND, types_N, groups_N = made(seed=5, num=90)
    found = purity(x_ND, types_N, groups_N, k=6)
    scaled = (x_ND - x_ND.mean(axis=0)) / x_ND.std(axis=0)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    per_type = {key: {t: [] for t in TYPES} for key in found}
    for cell in range(len(x_ND)):
        others = np.delete(np.arange(len(x_ND)), cell)
        order = others[np.argsort(-(scaled[others] @ scaled[cell]))]
        far = order[groups_N[order] != groups_N[cell]]
        alike = others[types_N[others] == types_N[cell]]
        values = {
            "same_slide": np.mean(groups_N[order[:6]] == groups_N[cell]),
            "same_slide_chance": np.mean(groups_N[others] == groups_N[cell]),
            "same_slide_chance_of_type": np.mean(groups_N[alike] == groups_N[cell]),
            "same_type": np.mean(types_N[far[:6]] == types_N[cell]),
            "same_type_chance": np.mean(types_N[far] == types_N[cell]),
        }
        for key, value in values.items():
            per_type[key][types_N[cell]].append(value)
    for key, values in per_type.items():
        assert np.isclose(found[key], np.mean([np.mean(v) for v in values.values()])), key


def test_purity_tells_slides_from_types():
    rng = np.random.default_rng(0)
    types_N, groups_N = np.tile(["a", "b"], 200), np.repeat(["s", "t", "u", "v"], 100)
    of_type = np.where(types_N == "a", 1.0, -1.0)[:, None] + rng.normal(0, 0.1, (400, 3))
    found = purity(of_type, types_N, groups_N)
    assert found["same_type"] == 1
    assert abs(found["same_slide"] - found["same_slide_chance_of_type"]) < 0.05
    of_slide = np.eye(4)[np.arange(400) // 100] + rng.normal(0, 0.05, (400, 4))
    found = purity(of_slide, types_N, groups_N)
    assert found["same_slide"] == 1
    assert abs(found["same_type"] - found["same_type_chance"]) < 0.1
