"""Shards: files with the cells of some tiles, read when a slide is finished.

A crash or a disk may have cut or changed a shard, or put another file under its name. So a slide's
shards are checked against its receipts before anything is written.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.nuclei import seams
from scellst_ray.runs.folder import RunFolder

SHARD = "SHARD"
FILE_KEY = b"scellst_ray.file"
IDS = ["slide_id", "cell_id"]
# Rows of a shard that is small enough to be kept in memory.
FEW_CELLS = 16_384
# Bytes of small shards kept in memory for the next table or slide that needs them.
KEPT_BYTES = 2**27
Stretch = tuple[str, int, int]


class DamagedShardsError(ValueError):
    """Shards of a slide are not what its receipts say: their tiles must be done again.

    Attributes:
        problems: What is wrong, by name of the shard.
    """

    def __init__(self, problems: Mapping[str, str]) -> None:
        """Take what is wrong with each shard."""
        self.problems = dict(problems)
        super().__init__(
            f"{'; '.join(self.problems.values())}. Such shards are removed, and their tiles are "
            "done again, at the latest by the next run of the same command"
        )

    def __reduce__(self) -> tuple[type["DamagedShardsError"], tuple[dict[str, str]]]:
        """Travel between processes."""
        return DamagedShardsError, (self.problems,)


def publish_shard(run: RunFolder, name: str, cells: pa.Table) -> None:
    """Publish a shard, signed with its run and its own name."""
    schema = schemas.sign_schema(cells.schema, SHARD, run.digest, {FILE_KEY: name.encode()})
    storage.publish_table(run.shard_uri(name), cells.replace_schema_metadata(schema.metadata))


class Shards:
    """Reader of the shards of a run. A small shard is read once for all tables and slides."""

    def __init__(self, run: RunFolder) -> None:
        """Read the shards of `run`."""
        self.run = run
        self.kept: dict[str, pa.Table] = {}
        self.lock = threading.Lock()

    def read(self, name: str, columns: list[str], *, keep: bool) -> pa.Table:
        """Return some columns of a shard; with `keep`, a small shard stays in memory.

        Raises:
            DamagedFileError: the shard is damaged, or another shard or no shard of this run.
            FileNotFoundError: the shard is absent.
        """
        uri, table = self.run.shard_uri(name), self.kept.get(name)
        if table is None and keep:
            # Without the lock, so that no thread waits for a request of another one.
            table = storage.read_small_table(uri, FEW_CELLS)
            if table is not None:
                self._keep(name, table)
        if table is None:
            schema = storage.read_schema(uri)
            self._check_schema(name, schema, columns)
            return storage.read_table(uri, columns)
        self._check_schema(name, table.schema, columns)
        return table.select(columns)

    def schema(self, name: str) -> pa.Schema:
        """Return a shard's schema."""
        table = self.kept.get(name)
        return storage.read_schema(self.run.shard_uri(name)) if table is None else table.schema

    def _keep(self, name: str, table: pa.Table) -> None:
        with self.lock:
            self.kept[name] = table
            while sum(kept.nbytes for kept in self.kept.values()) > KEPT_BYTES:
                del self.kept[next(iter(self.kept))]

    def _check_schema(self, name: str, schema: pa.Schema, columns: Sequence[str]) -> None:
        """Refuse a file that is signed as another one, or lacks columns of a shard."""
        uri, signed = self.run.shard_uri(name), schema.metadata or {}
        own = {
            b"scellst_ray.table": SHARD.encode(),
            b"scellst_ray.run_digest": self.run.digest.encode(),
            FILE_KEY: name.encode(),
        }
        # Shards of earlier releases are not signed.
        is_old = FILE_KEY not in signed and b"scellst_ray.table" not in signed
        if not is_old and any(signed.get(key) != value for key, value in own.items()):
            found = signed.get(FILE_KEY, signed.get(b"scellst_ray.table", b"")).decode()
            raise storage.DamagedFileError(uri, f"is another file under this name ({found})")
        missing = {*IDS, *columns} - set(schema.names)
        if missing:
            raise storage.DamagedFileError(uri, f"is no shard: it lacks {sorted(missing)}")


class SlideCells:
    """The cells of a slide in its shards, as its receipts name them."""

    def __init__(self, shards: Shards, slide_id: str, receipts: pa.Table) -> None:
        """Take the receipts of the slide, by ascending tile_id."""
        self.shards, self.slide_id = shards, slide_id
        receipts = receipts.filter(pa.array(receipts["num_cells"].to_numpy() > 0))
        names, tiles = receipts["shard"].to_pylist(), receipts["tile_id"].to_pylist()
        rows, counts = (receipts[n].to_pylist() for n in ("shard_row", "num_cells"))
        self.places = list(zip(names, tiles, rows, counts, strict=True))
        self.stretches = list(_stretches([(name, row, n) for name, _, row, n in self.places]))
        self.num_cells = sum(counts)
        self._keep = self.num_cells <= FEW_CELLS

    def read(self, columns: list[str]) -> Iterator[pa.Table]:
        """Yield the cells of all tiles, in tile order, holding one shard at a time."""
        open_name, shard = "", pa.table({})
        for name, start, num_cells in self.stretches:
            if name != open_name:
                open_name, shard = name, self.shards.read(name, columns, keep=self._keep)
            yield shard.slice(start, num_cells)

    def schema(self) -> pa.Schema:
        """Return the schema of the first shard."""
        return self.shards.schema(self.stretches[0][0])

    def check(self, *, thoroughly: bool = False) -> None:
        """Check that the shards hold what the receipts say: these tiles of this slide.

        Args:
            thoroughly: Read all columns, not the ids alone.

        Raises:
            DamagedShardsError: some do not, or are absent, cut or changed.
        """
        problems = {}
        for name in dict.fromkeys(name for name, *_ in self.places):
            try:
                ids = self.shards.read(name, IDS, keep=self._keep)
                if thoroughly:
                    storage.read_all(self.shards.run.shard_uri(name))
            except storage.DamagedFileError as error:
                problems[name] = str(error)
                continue
            except FileNotFoundError:
                problems[name] = f"{self.shards.run.shard_uri(name)}: is absent"
                continue
            if not self._holds_tiles(name, ids):
                uri = self.shards.run.shard_uri(name)
                problems[name] = f"{uri}: does not hold the tiles that the receipts log says"
        if problems:
            raise DamagedShardsError(problems)

    def _holds_tiles(self, name: str, ids: pa.Table) -> bool:
        """Return whether a shard holds the tiles of this slide where the receipts say."""
        of_slide = ids["slide_id"].combine_chunks().dictionary_encode()
        is_ours = np.array([text == self.slide_id for text in of_slide.dictionary.to_pylist()])
        is_ours = is_ours[of_slide.indices.to_numpy()]
        cell_id = ids["cell_id"].to_numpy()
        for _, tile, row, count in (place for place in self.places if place[0] == name):
            if row is None or row < 0:
                return False
            rows = slice(row, row + count)
            found = cell_id[rows]
            if (
                len(found) != count
                or not is_ours[rows].all()
                or (found >> seams.TILE_BITS != tile).any()
                or (np.diff(found) <= 0).any()
            ):
                return False
        return True


def _stretches(places: Sequence[Stretch]) -> Iterator[Stretch]:
    """Yield shard, first row and number of rows of tiles that follow each other in a shard."""
    name, start, end = "", 0, 0
    for shard, row, num_cells in places:
        if (shard, row) != (name, end):
            if end > start:
                yield name, start, end - start
            name, start = shard, row
        end = row + num_cells
    if end > start:
        yield name, start, end - start
