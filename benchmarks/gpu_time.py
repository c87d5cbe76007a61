"""Account for the time of GPUs: seconds by cause, from the calls that ran on them."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU_STAGES = ("network", "embed")

# useful: work whose result was used. redo: work that was repeated, or lost with its host. late: the
# time of calls beyond their work. start, input, tail: before, between and after a GPU's calls.
CAUSES = ("useful", "redo", "late", "start", "input", "tail")
Tile = tuple[str, int]


@dataclass(frozen=True)
class Call:
    """One call of a stage.

    Attributes:
        gpu: Name of the GPU; for a stage on CPUs that of the node.
        stage: Name of the stage.
        began: Start in seconds of a clock that all processes share.
        ended: End; None: the process was killed during the call.
        gpu_s: Seconds of one tile on a GPU that is not shared.
        tiles: Tiles of the call.
    """

    gpu: str
    stage: str
    began: float
    ended: float | None
    gpu_s: float
    tiles: tuple[Tile, ...]


def account(
    calls: Sequence[Call], lost: Mapping[str, float | None], first: float, last: float
) -> dict[str, float]:
    """Return the GPU seconds between two moments, by cause; they add up to those available.

    Args:
        calls: All calls.
        lost: Every GPU, and the time of its loss; None: it was not lost.
        first: Start of the account.
        last: End of the account.
    """
    finished = sorted((c for c in calls if c.ended is not None), key=lambda c: c.ended or 0.0)
    # If a tile had several calls, the result of the last one was used.
    counts = {(call.stage, tile): call for call in finished for tile in call.tiles}
    total = dict.fromkeys(CAUSES, 0.0)
    for gpu, lost_at in lost.items():
        end = last if lost_at is None else min(last, lost_at)
        mine = [call for call in calls if call.gpu == gpu and call.began < end]
        spans = [(c.began, end if c.ended is None else min(c.ended, end)) for c in mine]
        idle = idle_seconds(spans, first, end)
        useful = redo = 0.0
        for call in mine:
            done = 0 if call.ended is None else len(call.tiles)
            kept = sum(counts.get((call.stage, tile)) is call for tile in call.tiles)
            useful += call.gpu_s * kept
            redo += call.gpu_s * (done - kept)
        late = end - first - sum(idle.values()) - useful - redo
        if any(call.ended is None for call in mine):
            redo, late = redo + late, 0.0
        for cause, seconds in {"useful": useful, "redo": redo, "late": late, **idle}.items():
            total[cause] += seconds
    return total


def idle_seconds(
    spans: Sequence[tuple[float, float]], first: float, last: float
) -> dict[str, float]:
    """Return the seconds before, between and after some spans."""
    idle = {"start": 0.0, "input": 0.0, "tail": 0.0}
    if not spans:
        return idle | {"start": last - first}
    busy_until, cause = first, "start"
    for began, ended in sorted(spans):
        idle[cause] += max(0.0, began - busy_until)
        busy_until, cause = max(busy_until, ended), "input"
    return idle | {"tail": max(0.0, last - busy_until)}


def read_calls(folder: Path) -> list[Call]:
    """Return all calls; the last call of a killed process has no end."""
    calls = []
    for path in sorted(folder.iterdir()):
        fields: dict[str, Any] | None = None
        for line in path.read_text().splitlines():
            try:
                found = json.loads(line)
            except ValueError:  # the process was killed while it wrote the line
                break
            if fields is None:
                fields = found
                continue
            calls.append(_make_call(fields, found["ended"]))
            fields = None
        if fields is not None:
            calls.append(_make_call(fields, None))
    return calls


def _make_call(fields: dict[str, Any], ended: float | None) -> Call:
    tiles = tuple((slide_id, tile_id) for slide_id, tile_id in fields.pop("tiles"))
    return Call(ended=ended, tiles=tiles, **fields)


def summary(
    calls: list[Call], lost: dict[str, float | None], began: float, last: float
) -> dict[str, Any]:
    """Return efficiencies, and shares of the GPUs' time by cause, after the first tile."""
    first = min(call.began for call in calls if call.stage == "read")
    on_gpus = [call for call in calls if call.stage in GPU_STAGES]
    seconds = account(on_gpus, lost, first, last)
    all_s = sum(account(on_gpus, lost, began, last).values())
    nodes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for call in calls:
        for slide_id, _ in call.tiles if call.stage == "read" else ():
            nodes[slide_id][call.gpu] += 1
    num_read = sum(of_slide.total() for of_slide in nodes.values())
    num_on_main = sum(max(of_slide.values()) for of_slide in nodes.values())
    return {
        "gpus": len(lost),
        "gpus_lost": sum(at is not None for at in lost.values()),
        "start_s": round(first - began, 1),
        "wall_s": round(last - first, 1),
        "efficiency": round(seconds["useful"] / sum(seconds.values()), 3),
        "with_start": round(seconds["useful"] / all_s, 3),
        "shares": {cause: round(seconds[cause] / sum(seconds.values()), 3) for cause in CAUSES},
        "networks_on": len({call.gpu for call in on_gpus if call.stage == "network"}),
        "nodes_per_slide": round(sum(map(len, nodes.values())) / len(nodes), 2),
        "read_on_main_node": round(num_on_main / num_read, 3),
    }
