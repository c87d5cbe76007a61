"""The order in which training sees crops, and a reader that reads ahead.

The order depends only on the content of the store, the seed, the epoch and the size of the batch.
It does not depend on the number of workers, nor on the step at which a worker begins:

1. Each epoch permutes all row groups, and the rows of each group, and puts them in a line. The line
   is cut into `num_lanes` lanes of equal length. A group at a cut belongs to two lanes.
2. A lane takes `window` row groups at a time and shuffles their rows together. A group is a random
   part of its slide, and groups are of random slides. So no pass over all data is needed.
3. Every global batch has the next batch / num_lanes crops of each lane, in the order of lanes.
   Worker r of n reads lanes r, r + n, ...
4. At the end of an epoch, crops that fill no whole batch are dropped. These are less than a batch
   and a lane, and other crops in every epoch.

A worker that begins in the middle of an epoch counts row groups from the index, and reads only the
groups that it still needs.

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
    """Rows `start` to `stop` of a row group, in their order in this epoch."""

    number: int  # number of the group among all groups
    file: CropFile
    group: int
    start: int
    stop: int


class CropOrder:
    """The crops of each batch of each epoch.

    Attributes:
        steps_per_epoch: Number of whole batches in an epoch.
        lane_crops: Number of crops of each lane in a batch.
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
        """Plan the order; no crop is read yet.

        Args:
            store: Store of the crops.
            batch: Number of crops in a global batch; a multiple of `num_lanes`.
            seed: Seed of the order.
            num_lanes: Number of lanes, at least the largest number of workers. Another number
                gives another order.
            window: Number of row groups that a lane shuffles together. Another number gives
                another order.
            threads: Number of threads that read and decode, for each call of `batches`.

        Raises:
            ValueError: the batch is no multiple of the lanes, or there are too few crops for a
                batch.
        """
        if min(batch, num_lanes, window, threads) < 1 or batch % num_lanes:
            message = (
                f"batch is {batch}, num_lanes {num_lanes}, window {window}, threads {threads}; "
                "each must be at least 1, and batch must be a multiple of num_lanes"
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
        """Yield the crops of these lanes in each batch of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
            first_step: First step of the epoch to yield.
            lanes: Numbers of the lanes, such as `range(rank, num_lanes, num_workers)`.

        Yields:
            RGB uint8 [len(lanes) * lane_crops, 72, 72, 3], lane by lane.
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
        """Return the blocks of a lane in order; the rows of a block's pieces are shuffled."""
        ends = np.cumsum(self._rows[order])
        low, high = lane * self._lane_rows, (lane + 1) * self._lane_rows
        places = range(np.searchsorted(ends, low, "right"), np.searchsorted(ends, high) + 1)
        pieces = []
        for place in places:
            file, group = self._groups[order[place]]
            begin = int(ends[place]) - int(self._rows[order[place]])
            stop = min(high, int(ends[place])) - begin
            pieces.append(_Piece(int(order[place]), file, group, max(low - begin, 0), stop))
        # First blocks differ in size, so that lanes do not all read at the same steps.
        first = 1 + lane % self.window
        cuts = [0, *range(first, len(pieces), self.window), len(pieces)]
        return [pieces[a:b] for a, b in pairwise(cuts) if b > a]


def _num_groups(file: CropFile) -> int:
    return -(-file.num_crops // file.row_group)


class _Lane:
    """Encoded crops of a lane; the next block is read while crops are taken."""

    def __init__(
        self,
        blocks: list[list[_Piece]],
        parts: tuple[int, int, int],
        skip: int,
        files: CropFiles,
        pool: ThreadPoolExecutor,
    ) -> None:
        """Begin reading after the first `skip` crops; blocks within these are not read."""
        self._blocks, self._parts, self._files, self._pool = blocks, parts, files, pool
        self._next = 0
        while skip >= (num := sum(piece.stop - piece.start for piece in blocks[self._next])):
            skip, self._next = skip - num, self._next + 1
        self._skip = skip
        self._ready: deque[NDArray[np.uint8]] = deque()
        self._coming = self._begin(self._next)

    def take(self, num: int) -> list[NDArray[np.uint8]]:
        """Return the next `num` crops."""
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
        # Shuffled before the cut, so that lanes of a small store get other crops in every epoch.
        order = permutation(len(images), *self._parts[:2], "group", piece.number)
        return [images[i] for i in order[piece.start : piece.stop]]


class Prefetched(Generic[T]):
    """An iterator whose next items a thread makes ahead; to be used in a `with`.

    Attributes:
        waited_s: Seconds that the consumer has waited for items.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        """Begin making up to `depth` items."""
        self._items = items
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._coming = deque(self._thread.submit(self._one) for _ in range(max(depth, 1)))
        self.waited_s = 0.0

    def __enter__(self) -> Self:
        """Return this iterator."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the thread."""
        self.close()

    def __iter__(self) -> Self:
        """Return this iterator."""
        return self

    def __next__(self) -> T:
        """Return the next item; an error of making it is raised here."""
        started = time.perf_counter()
        items = self._coming.popleft().result() if self._coming else []
        self.waited_s += time.perf_counter() - started
        if not items:
            raise StopIteration
        self._coming.append(self._thread.submit(self._one))
        return items[0]

    def close(self) -> None:
        """Make no more items and stop the thread; may be called twice."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()
        close = getattr(self._items, "close", None)
        if close is not None:
            close()

    def _one(self) -> list[T]:
        """Return a list of the next item; an empty list at the end."""
        for item in self._items:
            return [item]
        return []


def prefetch(items: Iterator[T], depth: int = 2) -> Prefetched[T]:
    """Return an iterator whose next `depth` items a thread makes ahead; to be used in a `with`."""
    return Prefetched(items, depth)
