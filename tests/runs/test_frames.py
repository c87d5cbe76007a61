import pyarrow as pa

from scellst_ray.runs.frames import SLIDES, frame_of, slides_frame
from tests.support.run_folders import record


def test_no_record_gives_no_row():
    assert dict(slides_frame({}).schema) == SLIDES
    assert slides_frame({}).is_empty()


def test_what_a_record_lacks_is_null():
    shift = {"score": 1.5, "limit": 1.0, "beyond": True}
    records = {
        "b": record("b", "done", seconds={"read": 2.0}, domain_shift=shift, num_crops=3),
        "a": record("a", "failed", mpp=None),
    }
    frame = slides_frame(records)
    assert dict(frame.schema) == SLIDES
    assert frame["slide_id"].to_list() == ["a", "b"]
    assert frame["seconds_read"].to_list() == [None, 2.0]
    assert frame["domain_shift_score"].to_list() == [None, 1.5]
    assert frame["domain_shift_beyond"].to_list() == [None, True]
    assert frame["mpp"].to_list() == [None, None]


def test_a_table_as_a_frame():
    assert frame_of(pa.table({"x": [1, 2]}))["x"].to_list() == [1, 2]
