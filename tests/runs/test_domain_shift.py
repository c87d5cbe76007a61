"""Distance of a slide from the training slides: the closed form against loops over cells."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.models.mil.head import MilHead, save_head
from scellst_ray.runs import domain_shift as module
from scellst_ray.runs.domain_shift import (
    SlideScore,
    domain_of_bags,
    domain_warnings,
    limit_of_head,
    moments_of,
    score_held_out,
)
from scellst_ray.stages.networks import stored_distance, vectors

DIM = 24


def cells_of(seed, count, shift=0.0):
    """Return embeddings of one slide, with features of unequal scale and a constant one."""
    rng = np.random.default_rng(seed)
    scale_D = np.geomspace(0.05, 4, DIM)
    x_ND = (rng.normal(size=(count, DIM)) + 3 + shift + 0.1 * rng.normal(size=DIM)) * scale_D
    x_ND[:, 5] = 0.25
    return x_ND.astype(np.float16)


def score_by_loop(x_ND, others_ND):
    """Return the score as it is defined: cell by cell, feature by feature."""
    others_ND = others_ND.astype(np.float64)
    mean_D, std_D = others_ND.mean(axis=0), others_ND.std(axis=0)
    squares = []
    for x_D in x_ND.astype(np.float64):
        z_D = [(x - m) / (s or 1.0) for x, m, s in zip(x_D, mean_D, std_D, strict=True)]
        squares.append(np.mean(np.square(z_D)))
    return np.sqrt(np.mean(squares))


def test_closed_form_equals_a_loop_over_cells(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 37)
    slides = {"a": cells_of(0, 90), "b": cells_of(1, 150, 0.4), "c": cells_of(2, 40)}
    found = score_held_out({slide_id: moments_of(x_ND) for slide_id, x_ND in slides.items()})
    for slide_id, x_ND in slides.items():
        others_ND = np.concatenate([other for s, other in slides.items() if s != slide_id])
        expected = score_by_loop(x_ND, others_ND)
        assert found["held_out"][slide_id] == pytest.approx(expected, rel=1e-9)
    assert found["limit"] == max(found["held_out"].values())


def test_a_single_slide_gives_no_limit():
    assert score_held_out({"a": moments_of(cells_of(0, 9))}) == {"held_out": {}, "limit": None}
    with pytest.raises(ValueError, match="hold no instances"):
        moments_of(np.zeros((0, DIM), np.float16))


@pytest.fixture
def trained(tmp_path):
    """Return a head standardised by three slides, stored with their domain."""
    slides = {f"s{seed}": cells_of(seed, 300) for seed in range(3)}
    head = MilHead(DIM, 1)
    head.standardise(torch.from_numpy(np.concatenate(list(slides.values()))))
    info = {"genes": ["A"], "scaling": {}, "embedding_dim": DIM, "encoder_digest": "e"}
    info |= {"training_slides": sorted(slides), "metrics": {}}
    domain = score_held_out({slide_id: moments_of(x_ND) for slide_id, x_ND in slides.items()})
    save_head(str(tmp_path / "head"), head, info | {"domain": domain})
    save_head(str(tmp_path / "old"), head, info)
    return head, domain, tmp_path


def judged(head, x_ND, limit):
    """Return the record of a slide whose cells lie in two tiles."""
    distance_N = stored_distance(head, torch.from_numpy(x_ND)).numpy()
    table = pa.table({"distance": pa.array(distance_N)})
    score = SlideScore()
    assert len(list(score.counting([table.slice(0, 7), table.slice(7)]))) == 2
    return score.result(limit)


def test_a_shifted_slide_is_beyond_and_another_is_not(trained):
    head, domain, folder = trained
    limit = limit_of_head(str(folder / "head"))
    assert limit == domain["limit"]
    assert limit == pytest.approx(1.0, abs=0.1)
    alike = judged(head, cells_of(0, 200), limit)
    assert alike["beyond"] is False
    assert alike["score"] == pytest.approx(1.0, abs=0.1)
    shifted = judged(head, cells_of(0, 200, shift=1.5), limit)
    assert shifted["beyond"] is True
    assert shifted["score"] == pytest.approx(np.sqrt(1 + 1.5**2), rel=0.1)
    assert limit_of_head(str(folder / "old")) is None
    unknown = judged(head, cells_of(0, 200), None)
    assert unknown == alike | {"limit": None, "beyond": None}
    assert SlideScore().result(limit) is None


def test_distances_are_those_of_the_definition_and_always_numbers(trained):
    head, _, _ = trained
    x_ND = cells_of(7, 4)
    mean_D, std_D = head.mean_D.double().numpy(), head.std_D.double().numpy()
    expected = np.sqrt((((x_ND.astype(float) - mean_D) / std_D) ** 2).mean(axis=1))
    found = stored_distance(head, torch.from_numpy(x_ND))
    assert found.dtype == torch.float16
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)
    x_ND[:, 0] = [np.nan, np.inf, -np.inf, 0]
    assert stored_distance(head, torch.from_numpy(x_ND)).tolist()[:3] == [65504.0] * 3
    head.std_D.fill_(1e-4)
    x_ND[:] = 60000
    assert stored_distance(head, torch.from_numpy(x_ND)).tolist() == [65504.0] * 4
    assert stored_distance(head, torch.from_numpy(x_ND[:0])).shape == (0,)


def test_instances_are_those_of_the_bags(tmp_path):
    """A cell under two spots counts twice, as it does for the head."""
    slides, uris = {"a": cells_of(0, 30), "b": cells_of(1, 20)}, {}
    for slide_id, x_ND in slides.items():
        half = len(x_ND) // 2
        offsets = pa.array([0, half, len(x_ND)], pa.int32())
        table = pa.table(
            {
                "slide_id": [slide_id] * 2,
                "spot_id": ["p", "q"],
                "x0": [0.0, 1.0],
                "y0": [0.0, 1.0],
                "cell_id": pa.ListArray.from_arrays(offsets, pa.array(range(len(x_ND)))),
                "embedding": pa.ListArray.from_arrays(offsets, vectors(x_ND)),
                "target": [[0.0], [1.0]],
            }
        )
        uris[slide_id] = str(tmp_path / f"{slide_id}.parquet")
        signed = schemas.conform(table, schemas.bags_schema(DIM), "BAGS")
        storage.publish_table(uris[slide_id], signed)
    expected = score_held_out({slide_id: moments_of(x_ND) for slide_id, x_ND in slides.items()})
    assert domain_of_bags(uris) == expected


def test_warnings_name_the_farthest_and_count_the_rest():
    far = {f"s{n:02}": {"score": 2.0 + n, "limit": 1.2, "beyond": True} for n in range(12)}
    near = {"near": {"score": 1.1, "limit": 1.2, "beyond": False}}
    records = {slide_id: {"domain_shift": shift} for slide_id, shift in (far | near).items()}
    lines = domain_warnings(records | {"extracted": {}})
    assert len(lines) == 11
    assert lines[0].startswith("warning: s11: its cells look unlike")
    assert "2 more slides" in lines[-1]
    assert not any("near" in line for line in lines)
    unknown = {"domain_shift": {"score": 9.0, "limit": None, "beyond": None}}
    (line,) = domain_warnings({"a": unknown, "b": unknown})
    assert "this head has no limit of domain shift" in line
