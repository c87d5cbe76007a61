from scellst_ray.report.compared import SlideBeside


def test_slides_share_no_parts():
    one, other = SlideBeside((1, 2), {}), SlideBeside((1, 2), {})
    one.profiles["x"] = 0.5
    assert other.profiles == {}
