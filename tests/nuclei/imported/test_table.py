import json

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from scellst_ray.nuclei.imported.read_json import read_json
from scellst_ray.nuclei.imported.table import import_report

RINGS = st.lists(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=0, max_size=9), max_size=12
)


@settings(deadline=None, max_examples=150)
@given(RINGS)
def test_any_rings_give_valid_polygons_and_nothing_is_lost_uncounted(rings):
    """Points on a small grid give touching, crossing and degenerate outlines of every kind."""
    document = json.dumps({"cells": [{"contour": ring} for ring in rings]})
    expected = [polygon for ring in rings for polygon in _slow_twin(ring)]
    if rings and not expected:
        with pytest.raises(ValueError, match=f"none of its {len(rings)} objects"):
            read_json(document, "s")
        return
    table = read_json(document, "s")
    polygons = shapely.from_wkb(table["polygon"].to_pylist())
    assert (shapely.is_valid(polygons) & (shapely.area(polygons) > 0)).all()
    assert (shapely.get_num_interior_rings(polygons) == 0).all()
    np.testing.assert_allclose(shapely.area(polygons), [polygon.area for polygon in expected])
    assert shapely.equals(polygons, expected).all()
    report = import_report(table)
    assert len(table) + sum(report["dropped"].values()) == report["num_objects"] == len(rings)


def _slow_twin(ring):
    """Return the filled exterior of the largest part of a ring's valid form, or None."""
    if len(ring) < 3 or (ring[0] == ring[-1] and len(ring) < 4):
        return []
    valid = shapely.make_valid(shapely.Polygon(ring))
    pending, polygons = [valid], []
    while pending:
        geometry = pending.pop(0)
        if geometry.geom_type == "Polygon":
            polygons.append(geometry)
        elif hasattr(geometry, "geoms"):
            pending.extend(geometry.geoms)
    polygons = [polygon for polygon in polygons if polygon.area > 0]
    if not polygons:
        return []
    return [shapely.Polygon(max(polygons, key=lambda polygon: polygon.area).exterior)]
