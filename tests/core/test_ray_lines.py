"""Lines of Ray's own code are held back, and shown when a process dies."""

import io

import pytest

from scellst_ray.core.ray_lines import END, NUM_HELD, is_of_ray, pass_on

CPP = "[2026-12-01 04:18:21,078 E 20896 20896] core_worker.cc:2465: Actor with class name: 'A'"


@pytest.mark.parametrize(
    "line",
    [
        CPP,
        "[2026-12-01 04:14:46,954 W 14917 14917] (gcs_server) gcs_actor.cc:538: Failed to kill",
        f"(TrainController pid=15996) {CPP}",
        f"(MapWorker(MapBatches(PlanTiles)) pid=7, ip=10.0.0.2) {CPP}",
        '{"asctime":"2026-12-01 04:18:21,078","levelname":"E","message":"Actor"}',
        "Reporting training result 1: TrainingReport(checkpoint=None) from rank 0",
    ],
)
def test_lines_of_ray(line):
    assert is_of_ray(line)


@pytest.mark.parametrize(
    "line",
    [
        "",
        CPP.replace(" E ", " C "),  # fatal
        "*** SIGSEGV received at time=1764562701 on cpu 1 ***",
        "Traceback (most recent call last):",
        "2026-12-01 04:18:21,078 WARNING slide a is small [slide a]",
        '{"time": "2026-12-01T04:18:21.078+00:00", "level": "ERROR", "message": "Actor"}',
        "[1/2] reading",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ],
)
def test_lines_of_others(line):
    assert not is_of_ray(line)


def test_an_orderly_end_shows_nothing_of_ray():
    sink = io.BytesIO()
    pass_on([b"a\n", f"{CPP}\n".encode(), b"\xff\n", END, b"late"], sink)
    assert sink.getvalue() == b"a\n\xff\nlate"


def test_a_dying_process_shows_what_ray_wrote_last():
    sink = io.BytesIO()
    lines = [f"{CPP} {number}\n".encode() for number in range(NUM_HELD + 5)]
    pass_on([*lines, b"Aborted\n"], sink)
    assert sink.getvalue() == b"".join([b"Aborted\n", *lines[5:]])
