"""Attempts at tiles that end the worker's process: their counts, and giving up such tiles.

A segmentation fault in a decoder, the kernel's out-of-memory killer and a read that never returns
cannot be caught. They end the worker's process. Ray starts the worker again under the same id and
gives it the same batch, forever. So a worker keeps a note outside its process, and its successor
reads it:

1. Before each batch the worker writes the tiles it begins to `attempts/<session>/<worker>.json`,
   over the note of the batch before. The driver removes all notes at the end.
2. A worker reads its note when it starts. Each tile noted there had an attempt that ended with the
   process. If the host is lost, too, the tile is rarely the cause: four such ends count as one.
3. A batch with such a tile is taken one tile at a time, with a note for each tile and stage. So the
   other tiles of the batch are cleared, and the stage at fault is known.
4. A tile that ended `max_attempts` processes, the last of them alone, is not tried again: its row
   gets the error `ProcessDied`. After three such tiles of a slide, or `max_attempts` if that is
   more, the worker gives up the slide's other tiles, too. Otherwise the slide would cost days.
5. A batch that takes longer than `timeout_s` for each of its tiles ends its own process, since no
   thread can interrupt a call into C. The note says so, and the attempt counts like any other.
6. Slides that fail one after another on one GPU are the GPU's fault: see stages/gpu_watch.py.
7. A session is one pipeline of one driver. A driver that continues a run starts with new counts.

Planning a slide is guarded in the same way, as the slide's tile -1. A later attempt gives the same
results as the first.
"""

import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from scellst_ray import storage
from scellst_ray.core.logs import tile_fields
from scellst_ray.core.memory_limit import limit_memory
from scellst_ray.core.watchdog import Watchdog
from scellst_ray.pipelines.ray_internals import live_nodes, place_of_actor
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.gpu_watch import GpuWatch
from scellst_ray.stages.rows import AttemptedRow, Outcome
from scellst_ray.stages.tiles import guarded

HOSTS_PER_ATTEMPT = 4
TILES_OF_ROTTEN_SLIDE = 3
Key = tuple[str, int]
Done = TypeVar("Done")
Row = TypeVar("Row", bound=AttemptedRow)
Work = Callable[[list[Row], Callable[[str], None]], Done]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Limits of number and time of attempts. Results of tiles that succeed do not depend on them.

    Attributes:
        max_attempts: Number of processes that a tile, or the planning of a slide, may end.
        tile_timeout_s: Seconds a tile may take; None: no limit.
        plan_timeout_s: Seconds the planning of a slide may take; None: no limit.
    """

    max_attempts: int = 3
    tile_timeout_s: float | None = 1800.0
    plan_timeout_s: float | None = 1800.0


@dataclass
class Ended:
    """The attempts at one tile that ended with the process.

    Attributes:
        num_processes: Number of attempts whose process ended, and whose host did not.
        num_hosts: Number of attempts that ended with their host.
        alone: Whether the last attempt was at this tile alone.
        stage: Stage at which the last attempt ended; None if unknown.
        reason: Reason for which the last attempt ended; None if unknown.
    """

    num_processes: int = 0
    num_hosts: int = 0
    alone: bool = False
    stage: str | None = None
    reason: str | None = None

    def attempts(self) -> int:
        """Return the number of attempts that count against the tile."""
        return self.num_processes + self.num_hosts // HOSTS_PER_ATTEMPT


class Attempts:
    """The attempts of one worker, and of the earlier processes of the same worker."""

    def __init__(
        self,
        uri: str,
        max_attempts: int,
        timeout_s: float | None,
        host: str = "",
        is_lost: Callable[[str], bool] = lambda _: False,
        *,
        on_gpu: bool = False,
    ) -> None:
        """Read the note of the worker's earlier process.

        Args:
            uri: File of the worker's note: the same for all its processes, and no other worker's.
            max_attempts: Number of processes that a tile may end.
            timeout_s: Seconds a tile may take; None: no limit.
            host: Host on which this process runs.
            is_lost: Returns whether a host is lost.
            on_gpu: Whether this worker has a GPU.
        """
        self.gpu = GpuWatch(on_gpu=on_gpu)
        self.uri, self.max_attempts, self.timeout_s, self.host = uri, max_attempts, timeout_s, host
        self.ended: dict[Key, Ended] = {}
        self.watchdog = Watchdog(self._note_expiry)
        self._writing = threading.Lock()
        self._written = 0
        self._begin([])
        outcome = Outcome()
        with guarded(outcome, "note"):
            if storage.exists(uri):
                content = storage.read_bytes(uri)
                self._written = len(content)
                note: dict[str, Any] = json.loads(content)
                for slide_id, tile_id, ended in note.get("ended", []):
                    self.ended[slide_id, tile_id] = Ended(**ended)
                self.gpu.failed_slides = list(note.get("failed_slides", []))
                if note.get("begun"):
                    self._count(note, on_lost_host=is_lost(note["host"]))
                    # Written at once: this process, too, may end before its first batch.
                    self._write()
        _warn(outcome, f"{uri}: this note cannot be read, so earlier attempts do not count")

    def run_guarded(self, rows: list[Row], work: Work[Row, Done]) -> list[Done]:
        """Do `work` on rows: all at once, or one at a time if a tile among them ended a process.

        A tile that ended too many processes gets an error in its row. `work` gets that row, too.

        Args:
            rows: Tiles. Rows with an error, and slides without tiles, are never counted.
            work: Takes rows, and a function to call with the name of each stage that begins.
        """
        if not self.ended:
            return [self._attempt(rows, work)]
        live = [row for row in rows if _is_live(row)]
        for row in live:
            self._give_up_if_due(row)
        self.gpu.look([row for row in live if row.get("error") is not None])
        if not any(_is_live(row) and _key(row) in self.ended for row in rows):
            return [self._attempt(rows, work)]
        # In the order of the rows: Ray identifies the results of a repeated batch by their order.
        return [self._attempt([row], work) for row in rows]

    def _attempt(self, rows: list[Row], work: Work[Row, Done]) -> Done:
        live = [row for row in rows if _is_live(row)]
        if not live:
            return work(rows, lambda _: None)
        self._begin([_key(row) for row in live])
        self._write()
        suspected = len(live) == 1 and _key(live[0]) in self.ended
        seconds = None if self.timeout_s is None else self.timeout_s * len(live)
        with self.watchdog.limit(seconds):
            done = work(rows, self._enter if suspected else lambda _: None)
        self.gpu.look(live)
        return done

    def _begin(self, keys: list[Key]) -> None:
        self.begun = keys
        self.stage: str | None = None
        self.reason: str | None = None

    def _enter(self, stage: str) -> None:
        """Note the stage that begins."""
        self.stage = stage
        self._write()

    def _note_expiry(self, seconds: float) -> None:
        """Note the reason for which the process is about to end."""
        self.reason = f"took longer than {seconds:g} s"
        log_args = (_name_tiles(self.begun), self.reason, self.stage or "unknown")
        logger.error("%s: %s in stage %s", *log_args, extra=tile_fields(self.begun, self.stage))
        self._write()

    def _count(self, note: dict[str, Any], *, on_lost_host: bool) -> None:
        """Count the attempt in the note of the worker's earlier process, which has ended."""
        keys = [(slide_id, tile_id) for slide_id, tile_id in note["begun"]]
        for key in keys:
            ended = self.ended.setdefault(key, Ended())
            ended.num_hosts += on_lost_host
            ended.num_processes += not on_lost_host
            ended.alone = len(keys) == 1
            ended.stage, ended.reason = note["stage"], note["reason"]
        what = "was lost with its host" if on_lost_host else "ended"
        why = note["reason"] or "no reason known"
        log_args = (_name_tiles(keys), what, why)
        extra = tile_fields(keys, note["stage"])
        logger.warning("%s: the worker's process %s: %s", *log_args, extra=extra)

    def _is_given_up(self, ended: Ended) -> bool:
        return ended.alone and ended.attempts() >= self.max_attempts

    def _give_up_if_due(self, row: AttemptedRow) -> None:
        """Turn a row into an error if its tile, or too much of its slide, ended processes."""
        slide_id = row["slide_id"]
        ended = self.ended.get(_key(row), Ended())
        given_up = [e for (s, _), e in self.ended.items() if s == slide_id and self._is_given_up(e)]
        if self._is_given_up(ended):
            num = ended.num_processes + ended.num_hosts
            why = f", the last in stage {ended.stage}" if ended.stage else ""
            why += f": it {ended.reason}" if ended.reason else ""
            cause = f"{num} attempts ended with the worker's process{why}"
        elif len(given_up) >= max(self.max_attempts, TILES_OF_ROTTEN_SLIDE):
            ended = given_up[-1]
            cause = (
                f"not tried, after {len(given_up)} tiles of this slide ended the worker's process"
            )
        else:
            return
        remedy = (
            "check the file; give workers more memory (memory_gb, or fewer workers) or more time "
            "(tile_timeout_s, plan_timeout_s), or raise max_attempts; then run the same command"
        )
        row |= {
            "stage": ended.stage,
            "error_type": "ProcessDied",
            "error": f"{_name_tiles([_key(row)])}: {cause}; {remedy}",
        }

    def _write(self) -> None:
        """Write the note. If that fails, the worker continues without one."""
        note = {
            "host": self.host,
            "begun": self.begun,
            "stage": self.stage,
            "reason": self.reason,
            "ended": [[*key, asdict(ended)] for key, ended in self.ended.items()],
            "failed_slides": self.gpu.failed_slides,
        }
        outcome = Outcome()
        with self._writing, guarded(outcome, "note"):
            # Blanks overwrite the end of a longer earlier note; JSON ignores them.
            content = json.dumps(note).encode().ljust(self._written)
            _overwrite(self.uri, content)
            self._written = len(content)
        _warn(
            outcome, f"{self.uri}: this note cannot be written, so crashes of tiles are not counted"
        )


def _is_live(row: Mapping[str, object]) -> bool:
    return row.get("error") is None and row.get("num_tiles") != 0


def _key(row: AttemptedRow) -> Key:
    return row["slide_id"], row["tile_id"]


def _name_tiles(keys: list[Key]) -> str:
    """Return the names of slides and tiles for a message."""
    return ", ".join(f"slide {s!r}" + (f" tile {t}" if t >= 0 else "") for s, t in keys)


def _warn(outcome: Outcome, what: str) -> None:
    if outcome.get("error") is not None:
        logger.warning("%s: %s: %s", what, outcome["error_type"], outcome["error"])


def _overwrite(uri: str, content: bytes) -> None:
    """Overwrite a small file of this process with content that is at least as long as before.

    Nothing waits for the disk, since the note of a lost host is not needed. To rename a new file
    into place would wait, on file systems that write a file before they rename it.
    """
    fs, path = storage.resolve(uri)
    if not storage.is_local(uri):
        fs.pipe_file(path, content)
        return
    flags = os.O_WRONLY | os.O_CREAT
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileNotFoundError:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, flags, 0o666)
    try:
        os.pwrite(descriptor, content, 0)
    finally:
        os.close(descriptor)


def new_session(run: RunFolder) -> str:
    """Return a new folder for the notes of one pipeline's workers."""
    return storage.join(run.attempts_uri, uuid.uuid4().hex[:12])


def forget_attempts(run: RunFolder) -> None:
    """Remove the notes of all sessions. Nobody reads the notes of a session that has ended."""
    storage.remove_tree(run.attempts_uri)


def attempts_of_actor(
    folder: str, max_attempts: int, timeout_s: float | None, *, on_gpu: bool = False
) -> Attempts:
    """Return the attempts of the calling Ray actor, those of its earlier processes included.

    From now on the process cannot allocate much more memory than the actor declared to Ray.

    Args:
        folder: Folder of the session.
        max_attempts: Number of processes that a tile may end.
        timeout_s: Seconds a tile may take; None: no limit.
        on_gpu: Whether the actor has a GPU.
    """
    place = place_of_actor()
    if not on_gpu:
        limit_memory(place.memory)
    uri = storage.join(folder, f"{place.actor_id}.json")
    return Attempts(uri, max_attempts, timeout_s, place.node_id, _is_lost, on_gpu=on_gpu)


def _is_lost(node_id: str) -> bool:
    """Return whether Ray counts a node as dead."""
    return all(node.node_id != node_id for node in live_nodes())
