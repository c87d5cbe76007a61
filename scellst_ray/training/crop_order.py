"""The order in which training sees crops, and reading them ahead.

The order depends on the store's content, the seed, the epoch and the size of the batch alone, not
on how many workers read, nor on where one of them began:

1. An epoch permutes all row groups, and the rows of each, and puts them in a line. The line is cut
   into `num_lanes` stretches of equal length (a group at a cut is shared), one a lane.
2. A lane takes `window` row groups at a time and shuffles their rows together. A group is a random
   part of its slide, and groups are of random slides: no pass over the data is needed.
3. Every global batch has the next batch / num_lanes crops of each lane, in the order of lanes.
   Worker r of n reads lanes r, r + n, ... What is left when a lane cannot fill its part of another
   batch is dropped: less than a batch and a lane, and other crops in every epoch.

A worker that begins in the middle of an epoch counts row groups from the index and reads only those
it still needs.

Shapes: N crops, H W px, C channels.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from types import TracebackType
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from scellst_ray.runs.crop_files import decode_into, permutation
from scellst_ray.runs.crop_store import CropFile, CropFiles, CropStore, image_bytes

T = TypeVar("T")


class _Piece(NamedTuple):
    """From `start` to `stop` of the rows of a row group, in the order they have in this epoch."""

    number: int  # among all groups
    file: CropFile
    group: int
    start: int
    stop: int


class CropOrder:
    """Which crops each batch of each epoch has.

    Attributes:
        steps_per_epoch: Whole batches in an epoch.
        lane_crops: Crops of each lane in a batch.
    """

    def __init__(
        self,
        store: CropStore,
        batch: int,
        seed: int,
        num_lanes: int = 64,
        window: int = 4,
        threads: int = 2,
    ) -> None:
        """Plan, without reading.

        Args:
            store: The crops.
            batch: Crops of a global batch; a multiple of `num_lanes`.
            seed: Another seed is another order.
            num_lanes: What workers share: at least as many as there will ever be workers. Part of
                the order.
            window: Row groups that a lane shuffles together. Part of the order.
            threads: That read and decode, for each `batches`.

        Raises:
            ValueError: batch and lanes do not go together, or there are too few crops for a batch.
        """
        if min(batch, num_lanes, window, threads) < 1 or batch % num_lanes:
            message = (
                f"batch is {batch}, num_lanes {num_lanes}, window {window}, threads {threads}; "
                "each must be at least 1, and the batch a multiple of the lanes"
            )
            raise ValueError(message)
        self.store, self.seed, self.num_lanes = store, seed, num_lanes
        self.window, self.threads = window, threads
        self.lane_crops = batch // num_lanes
        self._lane_rows = store.num_crops // num_lanes
        self.steps_per_epoch = self._lane_rows // self.lane_crops
        if not self.steps_per_epoch:
            message = (
                f"batch is {batch}, and {', '.join(store.uris)} has {store.num_crops} crops; give "
                "a smaller batch, or extract more crops"
            )
            raise ValueError(message)
        groups = [(file, g) for file in store.files for g in range(_num_groups(file))]
        self._groups = groups
        self._rows = np.array([min(f.row_group, f.num_crops - g * f.row_group) for f, g in groups])

    def batches(
        self, epoch: int, first_step: int, lanes: Sequence[int]
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield what these lanes have of the batches of an epoch, from one step on.

        Args:
            epoch: From 0.
            first_step: Of the epoch.
            lanes: Which lanes, such as `range(rank, num_lanes, num_workers)`.

        Yields:
            RGB uint8 [len(lanes) * lane_crops, 72, 72, 3], a lane after another.
        """
        if first_step >= self.steps_per_epoch:
            return
        px, num = self.store.crop_px, self.lane_crops
        files = CropFiles()
        order = permutation(len(self._groups), self.seed, epoch)
        pool = ThreadPoolExecutor(self.threads, "crops")
        try:
            skip = first_step * num
            streams = [
                _Lane(self._blocks(order, lane), (self.seed, epoch, lane), skip, files, pool)
                for lane in lanes
            ]
            for _ in range(first_step, self.steps_per_epoch):
                out = np.empty((len(streams), num, px, px, 3), np.uint8)
                parts = [stream.take(num) for stream in streams]
                for _ in pool.map(decode_into, parts, out):
                    pass
                yield out.reshape(-1, px, px, 3)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _blocks(self, order: NDArray[np.int64], lane: int) -> list[list[_Piece]]:
        """Return what a lane reads, in the order it does; the pieces of a block are shuffled."""
        ends = np.cumsum(self._rows[order])
        low, high = lane * self._lane_rows, (lane + 1) * self._lane_rows
        places = range(np.searchsorted(ends, low, "right"), np.searchsorted(ends, high) + 1)
        pieces = []
        for place in places:
            file, group = self._groups[order[place]]
            begin = int(ends[place]) - int(self._rows[order[place]])
            stop = min(high, int(ends[place])) - begin
            pieces.append(_Piece(int(order[place]), file, group, max(low - begin, 0), stop))
        # The first blocks differ in size, so lanes do not all read at the same steps.
        first = 1 + lane % self.window
        cuts = [0, *range(first, len(pieces), self.window), len(pieces)]
        return [pieces[a:b] for a, b in pairwise(cuts) if b > a]


def _num_groups(file: CropFile) -> int:
    return -(-file.num_crops // file.row_group)


class _Lane:
    """Coded crops of a lane; a block ahead of what is taken is being read."""

    def __init__(
        self,
        blocks: list[list[_Piece]],
        parts: tuple[int, int, int],
        skip: int,
        files: CropFiles,
        pool: ThreadPoolExecutor,
    ) -> None:
        """Begin reading, without what the first `skip` crops are the whole of."""
        self._blocks, self._parts, self._files, self._pool = blocks, parts, files, pool
        self._next = 0
        while skip >= (num := sum(piece.stop - piece.start for piece in blocks[self._next])):
            skip, self._next = skip - num, self._next + 1
        self._skip = skip
        self._ready: deque[NDArray[np.uint8]] = deque()
        self._coming = self._begin(self._next)

    def take(self, num: int) -> list[NDArray[np.uint8]]:
        """Return the next crops."""
        while len(self._ready) < num:
            images = [image for piece in self._coming for image in piece.result()]
            order = permutation(len(images), *self._parts, self._next)[self._skip :]
            self._ready.extend(images[i] for i in order)
            self._skip, self._next = 0, self._next + 1
            self._coming = self._begin(self._next)
        return [self._ready.popleft() for _ in range(num)]

    def _begin(self, block: int) -> list[Future[list[NDArray[np.uint8]]]]:
        pieces = self._blocks[block] if block < len(self._blocks) else []
        return [self._pool.submit(self._read, piece) for piece in pieces]

    def _read(self, piece: _Piece) -> list[NDArray[np.uint8]]:
        table = self._files.read(piece.file, [piece.group], ["image"])
        images = image_bytes(table["image"])
        # Shuffled before it is cut, so that a small store's lanes have others in every epoch.
        order = permutation(len(images), *self._parts[:2], "group", piece.number)
        return [images[i] for i in order[piece.start : piece.stop]]


class Prefetched(Generic[T]):
    """An iterator whose next items are made ahead by a thread of its own; use it in a `with`.

    Attributes:
        waited_s: Seconds the consumer has waited for items.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        """Begin making up to `depth` items."""
        self._items = items
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._coming = deque(self._thread.submit(self._one) for _ in range(max(depth, 1)))
        self.waited_s = 0.0

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.close()

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> T:
        """Return the next item; raises here what making it raised."""
        started = time.perf_counter()
        found = self._coming.popleft().result() if self._coming else []
        self.waited_s += time.perf_counter() - started
        if not found:
            raise StopIteration
        self._coming.append(self._thread.submit(self._one))
        return found[0]

    def close(self) -> None:
        """Make no more, and end the threads; closing twice is no error."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()
        close = getattr(self._items, "close", None)
        if close is not None:
            close()

    def _one(self) -> list[T]:
        """Return the next item, or nothing at the end."""
        for item in self._items:
            return [item]
        return []


def prefetched(items: Iterator[T], depth: int = 2) -> Prefetched[T]:
    """Return an iterator whose next `depth` items are made by a thread; use it in a `with`."""
    return Prefetched(items, depth)
