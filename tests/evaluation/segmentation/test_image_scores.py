"""Scores of an image: masks, centroids and types together, in the frame of the annotation."""

import math

import numpy as np
import pytest
import shapely
from scipy import ndimage
from scipy.spatial.distance import cdist

from scellst_ray.core.geometry import Frame
from scellst_ray.evaluation.segmentation.annotations import NucleiFile
from scellst_ray.evaluation.segmentation.detection_metrics import DetectionCounts
from scellst_ray.evaluation.segmentation.image_scores import (
    Annotated,
    as_dict,
    score_image,
    summary,
)
from scellst_ray.evaluation.segmentation.mask_metrics import score_labels
from scellst_ray.nuclei.instances import nuclei_from_labels

ONE = Frame(0, 0, 1, 1)
NO_NAMES = ({}, {})


def blobs(seed, size=90):
    """Return a label map of round nuclei without holes, numbered 1 to N."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(size, size)), 2)
    labels, _ = ndimage.label(ndimage.binary_fill_holes(noise > 0.05))
    return labels.astype(np.int32)


def as_map(labels, types=None, source="map"):
    """Return a label map as its file would be read."""
    number = labels.max()
    centroid = np.array(ndimage.center_of_mass(labels > 0, labels, range(1, number + 1)))
    names = np.full(number, "") if types is None else np.asarray(types, np.str_)
    return NucleiFile(source, centroid.reshape(-1, 2)[:, ::-1] + 0.5, names, labels_HW=labels)


def as_cells(labels, frame=ONE, types=None):
    """Return a label map as the CELLS that its nuclei would become, in level-0 px."""
    nuclei = nuclei_from_labels(labels)
    # nuclei_from_labels sorts by centroid; types are by label.
    order = cdist(nuclei.centroid_px, as_map(labels).centroid_N2).argmin(axis=1)
    names = np.full(len(nuclei), "nucleus") if types is None else np.asarray(types, np.str_)[order]
    return NucleiFile(
        "CELLS",
        frame.to_level0(nuclei.centroid_px),
        names,
        polygons_N=shapely.from_wkb(nuclei.polygon_wkb(frame)),
    )


def as_points(nuclei):
    """Return the same nuclei without their masks."""
    return NucleiFile("points", nuclei.centroid_N2, nuclei.types_N)


@pytest.mark.parametrize("frame", [ONE, Frame(500.0, -30.0, 2.2, 2.2), Frame(7, 9, 0.4, 0.4)])
@pytest.mark.parametrize("kind", ["cells", "a map of the same pixels"])
def test_what_was_annotated_is_perfect_in_every_frame(frame, kind):
    labels = blobs(0)
    predicted = as_cells(labels, frame) if kind == "cells" else as_map(labels)
    found = score_image(as_map(labels), predicted, Annotated(frame, 0.5), NO_NAMES, 3)
    number = int(labels.max())
    assert found.centroids == DetectionCounts(number, number, number)
    assert (found.masks.pq, found.masks.aji, found.masks.f1) == (1, 1, 1)
    assert all(counts.num_true == 0 for counts in found.types.values())
    assert set(found.types) == ({"nucleus"} if kind == "cells" else set())
    assert found.type_pq == {}


def test_masks_are_those_of_score_labels():
    true, predicted = blobs(1), np.roll(blobs(1), (1, 2), (0, 1))
    expected = score_labels(true, predicted)
    annotated = Annotated(ONE, None)
    for other in (as_map(predicted), as_cells(predicted)):
        found = score_image(as_map(true), other, annotated, NO_NAMES, 3)
        assert found.centroids is None
        if other.labels_HW is not None or not edges_meet(predicted):
            assert found.masks == expected
    assert 0 < expected.pq < 1


def edges_meet(labels):
    """Return whether rolling has joined parts at opposite edges under one label."""
    return any(ndimage.label(labels == k)[1] > 1 for k in range(1, labels.max() + 1))


def test_a_region_of_a_slide():
    labels = blobs(2)
    whole = as_cells(labels)
    part = labels[20:60, 30:80]
    names, flat = np.unique(part, return_inverse=True)
    part = flat.reshape(part.shape).astype(np.int32)
    assert names[0] == 0
    found = score_image(as_map(part), whole, Annotated(Frame(30, 20, 1, 1), 0.25), NO_NAMES, 3)
    # Nuclei at the border are cut in the prediction, too; nuclei beyond it are left out.
    assert found.masks.pq == found.masks.aji == 1
    inside = (whole.centroid_N2 >= (30, 20)).all(1) & (whole.centroid_N2 < (80, 60)).all(1)
    assert found.centroids.num_predicted == inside.sum()
    # Points have no edges unless a size is given.
    points = as_points(as_map(part))
    sized = score_image(points, whole, Annotated(Frame(30, 20, 1, 1), 0.25, (50, 40)), NO_NAMES, 3)
    assert sized.centroids == found.centroids
    assert sized.masks is None
    untold = score_image(points, whole, Annotated(Frame(30, 20, 1, 1), 0.25), NO_NAMES, 3)
    assert untold.centroids.num_predicted == len(whole.types_N)


def test_the_radius_is_in_um_of_the_annotation():
    true = NucleiFile("t", np.array([[10.0, 10.0]]), np.array(["a"]))
    # 4 px of an annotation at 0.5 um/px, on a slide at 0.25: 2 um.
    predicted = NucleiFile("p", np.array([[28.0, 20.0]]), np.array(["a"]))
    annotated = Annotated(Frame(0, 0, 2, 2), 0.5)
    for radius, matched in ((1.99, 0), (2.0, 1)):
        found = score_image(true, predicted, annotated, NO_NAMES, radius)
        assert found.centroids.num_matched == matched


def test_pq_of_types_is_that_of_maps_of_one_type():
    rng = np.random.default_rng(3)
    true, predicted = blobs(3), blobs(3)
    predicted[:, ::7] = 0  # cuts, so that matches are not perfect
    predicted = ndimage.label(predicted)[0].astype(np.int32)
    true_types = rng.choice(["a", "b", "c"], true.max())
    predicted_types = rng.choice(["A", "b", "d"], predicted.max())
    found = score_image(
        as_map(true, true_types),
        as_map(predicted, predicted_types),
        Annotated(ONE, 0.5),
        ({"a": "a"}, {"A": "a"}),
        3,
    )
    assert sorted(found.type_pq) == sorted(found.types) == ["a", "b", "c", "d"]
    for name, other in (("a", "A"), ("b", "b"), ("c", "c"), ("d", "d")):
        kept = np.isin(true, 1 + np.flatnonzero(true_types == name))
        others = np.isin(predicted, 1 + np.flatnonzero(predicted_types == other))
        expected = score_labels(np.where(kept, true, 0), np.where(others, predicted, 0)).pq
        assert found.type_pq[name] == pytest.approx(expected)
        assert found.types[name].num_true == (true_types == name).sum()
    shown = as_dict(found, typed=True)
    assert shown["mpq"] == pytest.approx(np.mean(list(found.type_pq.values())))
    assert shown["types"]["a"]["pq"] == found.type_pq["a"]


def test_typed_cells_against_a_typed_map_are_perfect():
    labels = blobs(4)
    types = np.random.default_rng(4).choice(["a", "b"], labels.max())
    found = score_image(
        as_map(labels, types), as_cells(labels, types=types), Annotated(ONE, 0.5), NO_NAMES, 3
    )
    assert set(found.type_pq.values()) == {1.0}
    assert {counts.f1 for counts in found.types.values()} == {1.0}


def test_several_images_as_one():
    labels, other = blobs(5), blobs(6)
    empty = np.zeros_like(labels)
    annotated = Annotated(ONE, 0.5)
    images = [
        score_image(as_map(labels), as_map(labels), annotated, NO_NAMES, 3),
        score_image(as_map(other), as_map(empty), annotated, NO_NAMES, 3),
        score_image(as_map(empty), as_map(empty), annotated, NO_NAMES, 3),
    ]
    number, missed = int(labels.max()), int(other.max())
    found = summary(images)
    assert found.centroids == DetectionCounts(number + missed, number, number)
    assert (found.masks.num_true, found.masks.num_matched) == (number + missed, number)
    # The mean of 1 and 0; the image without nuclei is left out.
    assert (found.masks.pq, found.masks.f1, found.masks.aji) == (0.5, 0.5, 0.5)
    assert found.masks.sq == 1
    assert math.isnan(images[2].masks.pq)
    assert as_dict(images[2], typed=False)["masks"]["pq"] is None
    assert "types" not in as_dict(images[2], typed=False)
    assert summary([]).masks is summary([]).centroids is None


def test_types_without_any_in_common_say_only_what_was_found():
    labels = blobs(7)
    types = np.where(np.arange(labels.max()) % 2, "a", "b")
    found = score_image(as_map(labels, types), as_cells(labels), Annotated(ONE, 0.5), NO_NAMES, 3)
    shown = as_dict(found, typed=False)
    assert shown["types"]["a"] == {
        "num_true": int((types == "a").sum()),
        "num_detected": int((types == "a").sum()),
        "detected": 1.0,
    }
    assert "nucleus" not in shown["types"]
    assert "mpq" not in shown


def test_what_cannot_be_compared():
    labels = blobs(8)
    with pytest.raises(ValueError, match=r"p.png is \(80, 90\) px and t.png \(90, 90\)"):
        score_image(
            as_map(labels, source="t.png"),
            as_map(labels[:80], np.full(labels.max(), ""), source="p.png"),
            Annotated(ONE, 0.5),
            NO_NAMES,
            3,
        )
    points = as_points(as_map(labels))
    with pytest.raises(ValueError, match="points: to match points in um, give --mpp"):
        score_image(points, as_cells(labels), Annotated(ONE, None), NO_NAMES, 3)
