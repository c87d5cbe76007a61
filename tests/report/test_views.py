from scellst_ray.report.views import SlideView


def test_views_share_no_lists():
    one, other = SlideView("a"), SlideView("b")
    one.notes.append("x")
    one.means["g"] = 1.0
    assert other.notes == []
    assert other.means == {}
