"""Lines of Ray's own code are held back, and shown when a process dies."""

import os
import threading
import time

import pytest

from scellst_ray.core.ray_lines import (
    CRASH,
    END,
    LONGEST,
    NUM_HELD,
    PAUSE_S,
    LineFilter,
    is_of_ray,
    pass_on,
    write_all,
)

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
        f"(Ray pid=raylet) {CPP}",
        "I0000 00:00:1764562701.078123   12345 fork_posix.cc:75] Other threads are calling gRPC",
        "E1201 04:18:21.078123 12345 chttp2_transport.cc:1141] keepalive",
        "[mutex.cc : 452] RAW: Lock blocking 0x55eb88188880   @ 0x7f5f0dc2b1a2 0x7f5f0ccfb23c",
        "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
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
        "[mutex.cc : 1490] RAW: Potential Mutex deadlock:",
        "[spinlock.cc : 20] RAW: Check held failed: lock",
        "I see 12 slides",
        "WARNING: low on disk",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ],
)
def test_lines_of_others(line):
    assert not is_of_ray(line)


def filtered(*parts):
    """Return what a filter shows of parts that come in this order, each by itself."""
    shown = []
    lines = LineFilter(shown.append)
    for part in parts:
        lines.feed(part)
    lines.close()
    return b"".join(shown)


HELD = f"{CPP}\n".encode()


def test_an_orderly_end_shows_nothing_of_ray():
    assert filtered(b"a\n", HELD, b"\xff\n", END, b"late") == b"a\n\xff\nlate"


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_the_parts_in_which_bytes_come_do_not_matter(size):
    text = b"a\r\n" + HELD + b"\n\xe2\x94\x81 no end" + END
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    assert filtered(*parts) == b"a\r\n\n\xe2\x94\x81 no end"


def test_a_dying_process_shows_what_ray_wrote_last():
    lines = [f"{CPP} {number}\n".encode() for number in range(NUM_HELD + 5)]
    assert filtered(*lines, b"Aborted\n") == b"".join([b"Aborted\n", *lines[5:]])


def test_a_crash_shows_what_ray_wrote_though_a_child_may_still_write():
    shown = []
    lines = LineFilter(shown.append)
    lines.feed(HELD + b"begun" + CRASH)
    assert shown == [HELD, b"begun"]
    lines.feed(b"child\n")
    lines.close()
    assert shown[2:] == [b"child\n"]


def test_a_question_is_shown_before_its_line_ends():
    shown = []
    lines = LineFilter(shown.append)
    lines.feed(HELD + b"Password: ")
    assert shown == []
    lines.pause()
    assert shown == [b"Password: "]
    lines.feed(b"[2026" + HELD)  # the rest of that line, though it looks like Ray's
    assert shown[1:] == [b"[2026" + HELD]
    lines.feed(HELD[:9])
    lines.pause()  # may become a line of Ray's
    lines.feed(HELD[9:] + END)
    lines.close()
    assert shown[2:] == []


def test_a_line_without_an_end_takes_no_memory():
    shown = []
    lines = LineFilter(shown.append)
    for _ in range(100):
        lines.feed(b"[" * LONGEST)
        assert len(lines.begun) <= LONGEST
    lines.close()
    assert len(b"".join(shown)) == 100 * LONGEST


def test_descriptors_are_filtered_until_the_end():
    source, writing = os.pipe()
    reading, sink = os.pipe()
    thread = threading.Thread(target=pass_on, args=(source, sink))
    thread.start()
    os.write(writing, HELD + b"ready? ")
    assert os.read(reading, 100) == b"ready? "
    os.write(writing, b"yes\n" + END)
    os.close(writing)
    thread.join()
    assert os.read(reading, 100) == b"yes\n"
    for descriptor in (source, reading, sink):
        os.close(descriptor)


def test_a_sink_that_is_slow_or_gone_blocks_nothing():
    reading, sink = os.pipe()
    os.set_blocking(sink, False)
    data, found = b"x" * (1 << 20), []
    thread = threading.Thread(target=write_all, args=(sink, data))
    thread.start()
    time.sleep(PAUSE_S)  # let it fill the pipe
    while sum(map(len, found)) < len(data):
        found.append(os.read(reading, 1 << 16))
    thread.join()
    os.close(reading)
    write_all(sink, data)  # nobody reads: no error
    os.close(sink)
    assert b"".join(found) == data
