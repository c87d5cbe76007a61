"""When a GPU that fails stops the run."""

import pytest

from scellst_ray.pipelines.attempts import Attempts
from scellst_ray.stages.gpu_watch import GpuError, GpuWatch


def row(slide_id, tile_id=0, error="CUDA error: unknown", stage="network"):
    failure = {"stage": stage, "error_type": "RuntimeError", "error": error} if error else {}
    return {"slide_id": slide_id, "tile_id": tile_id, "num_tiles": 9, "error": None} | failure


def test_three_slides_in_a_row_are_the_gpus_fault():
    watch = GpuWatch(on_gpu=True)
    watch.look([row("a", 0), row("a", 1)])
    watch.look([row("a", 2), row("b", 0)])
    with pytest.raises(GpuError, match=r"3 slides in a row \(a, b, c\).*stage network.*CUDA error"):
        watch.look([row("c")])


def test_one_tile_that_succeeds_clears_it():
    watch = GpuWatch(on_gpu=True)
    for slide_id in "abcdefgh":
        watch.look([row(slide_id)])
        watch.look([row("x", 1), row("x", 2, error=None)])
    assert watch.failed_slides == []


@pytest.mark.parametrize(("on_gpu", "stage"), [(False, "network"), (True, "read"), (True, "write")])
def test_what_is_not_of_a_gpu_is_the_tiles_own(on_gpu, stage):
    watch = GpuWatch(on_gpu=on_gpu)
    for slide_id in "abcdefgh":
        watch.look([row(slide_id, stage=stage)])
    assert watch.failed_slides == []


class Died(BaseException):
    """Stands for the end of a process."""


def test_a_gpu_that_ends_processes_on_slide_after_slide_stops_the_run(tmp_path):
    num_deaths = 0

    def work(rows, begins):
        nonlocal num_deaths
        begins("network")
        if all(r["error"] is not None for r in rows):
            return rows
        num_deaths += 1
        raise Died

    def start():
        return Attempts(str(tmp_path / "note"), 3, None, on_gpu=True)

    worker = start()

    def do(slide_id):
        nonlocal worker
        while True:
            try:
                worker.run_guarded([row(slide_id, error=None)], work)
            except Died:
                worker = start()
            else:
                return

    do("a")
    do("b")
    with pytest.raises(GpuError, match=r"\(a, b, c\)"):
        do("c")
    assert num_deaths == 9
