from scellst_ray.pipelines.progress import Progress


def test_a_run_begins_without_progress():
    progress, other = Progress(3), Progress(3)
    progress.records["a"] = {"slide_id": "a"}
    assert (progress.num_slides, progress.num_tiles, progress.num_cells) == (3, 0, 0)
    assert other.records == {}
    assert other.started >= progress.started
