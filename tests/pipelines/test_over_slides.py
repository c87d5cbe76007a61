"""One function over slides: by Ray as here, and a bad slide costs the other slides nothing."""

import os
import signal
import uuid

import pytest

from scellst_ray.pipelines.over_slides import SlideResult, over_slides, values_of

SLIDES = [f"s{number}" for number in range(20)]


def number_of(slide_id):
    if slide_id == "s3":
        message = "s3: its table is damaged"
        raise ValueError(message)
    if slide_id == "s4":
        return {}[slide_id]
    return int(slide_id[1:])


def dies(slide_id):
    if slide_id == "s1":
        os.kill(os.getpid(), signal.SIGKILL)
    return slide_id


class Noted:
    """A function with data: a file is made each time that it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, slide_id):
        return slide_id, os.getpid()

    def __reduce__(self):
        return unpickled, (self.folder,)


def unpickled(folder):
    (folder / uuid.uuid4().hex).touch()
    return Noted(folder)


EXPECTED = [SlideResult(slide_id, int(slide_id[1:])) for slide_id in SLIDES]
EXPECTED[3] = SlideResult("s3", error="s3: its table is damaged")
EXPECTED[4] = SlideResult("s4", error="KeyError: 's4'")


def test_slides_here():
    assert list(over_slides(number_of, SLIDES, use_ray=False)) == EXPECTED
    assert list(over_slides(number_of, [])) == []


@pytest.mark.ray
def test_ray_gives_the_same_in_the_same_order(local_ray):
    del local_ray
    assert list(over_slides(number_of, SLIDES)) == EXPECTED
    # A process that ends is its slide's error.
    found = list(over_slides(dies, SLIDES[:3]))
    assert [result.value for result in found] == ["s0", None, "s2"]
    assert "WorkerCrashedError" in found[1].error


@pytest.mark.ray
def test_each_worker_reads_the_function_once(local_ray, tmp_path):
    del local_ray
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        values = [result.value for result in over_slides(Noted(folder), SLIDES)]
        assert [slide_id for slide_id, _ in values] == SLIDES
        assert len(list(folder.iterdir())) == len({pid for _, pid in values}) < len(SLIDES)


def test_few_slides_start_no_ray(monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert [result.value for result in over_slides(len, ["a", "bb"])] == [1, 2]
    assert not ray.is_initialized()


def test_failed_slides_are_named_after_the_others(caplog):
    results = over_slides(number_of, SLIDES[:6], use_ray=False)
    values = values_of(results, "exported")
    found = []
    with pytest.raises(ValueError, match=r"2 slide.* not exported: s3, s4; the first: s3: "):
        found.extend(values)
    assert found == [("s0", 0), ("s1", 1), ("s2", 2), ("s5", 5)]
    assert "slide s4 was not exported: KeyError" in caplog.text
    whole = over_slides(number_of, SLIDES[:2], use_ray=False)
    assert list(values_of(whole, "exported")) == [("s0", 0), ("s1", 1)]
