"""Reading a run: its slides, cells, embeddings and any genes of any cells.

This module needs neither Ray nor torch. A table counts only if its slide's record names it; files
that a crash left without a record are never read. Expression is computed when it is read, from the
stored hidden factor.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.core.names import check_names
from scellst_ray.models.mil.stored_head import (
    HEAD_FILE,
    LastLayer,
    read_last_layer,
    vector_matrix,
)
from scellst_ray.runs.documents import read_sources, warn_once
from scellst_ray.runs.expression import (
    CellIds,
    Genes,
    What,
    iter_expression,
    layer_of,
    read_expression,
)
from scellst_ray.runs.folder import (
    RUN_FILE,
    SLIDES_FILE,
    SOURCES_REMEDY,
    RunFolder,
    read_run_info,
)
from scellst_ray.runs.frames import frame_of, slides_frame
from scellst_ray.runs.lazy_expression import lazy_expression
from scellst_ray.runs.records import RunInfo, SlideRecord, SlideSource
from scellst_ray.runs.tables import open_table, read_rows, stamp_in


@dataclass(frozen=True)
class Run:
    """A run as it was when it was opened. Open it again to see slides finished since.

    Attributes:
        folder: The run folder.
        info: Content of run.json.
        records: The record of every slide that has one, by slide_id.
    """

    folder: RunFolder
    info: RunInfo
    records: dict[str, SlideRecord]

    @property
    def uri(self) -> str:
        """Return the run folder."""
        return self.folder.uri

    @cached_property
    def slides(self) -> pl.DataFrame:
        """Return one row per slide that has a record, sorted by slide_id."""
        return slides_frame(self.records)

    @cached_property
    def sources(self) -> dict[str, SlideSource]:
        """Return the content of slides.json: every slide that commands on this run were given.

        A damaged file gives a warning, and no slides.
        """
        try:
            uri = storage.join(self.uri, SLIDES_FILE)
            return read_sources(uri, SlideSource, SOURCES_REMEDY)
        except storage.DamagedFileError as error:
            warn_once(str(error))
            return {}

    def failures(self) -> pl.DataFrame:
        """Return the failed tiles of all slides; tile_id -1: the slide could not be planned."""
        tables = [schemas.FAILURES.empty_table()]
        for slide_id in sorted(self.records):
            if self.records[slide_id].get("num_failed_tiles"):
                with open_table(self.folder, self.records[slide_id], "FAILURES") as file:
                    table = read_rows(file, schemas.FAILURES.names)
                tables.append(table.cast(schemas.FAILURES))
        return frame_of(pa.concat_tables(tables))

    @cached_property
    def last_layer(self) -> LastLayer:
        """Return the last layer of the run's head.

        The file is compared with the SHA-256 in run.json when it is first read.

        Raises:
            ValueError: the run has no head, or the file is missing, damaged or another head.
        """
        if not self.has_expression:
            message = f"{self.uri}: this run has no expression: run predict (scellst-ray predict)"
            raise ValueError(message)
        uri = storage.join(self.uri, HEAD_FILE)
        try:
            return read_last_layer(uri, self.info.get("identity", {}).get("head"))
        except FileNotFoundError as error:
            message = f"{uri}: the run's head is missing: put it back, or run predict again"
            raise ValueError(message) from error

    @property
    def genes(self) -> list[str]:
        """Return the gene panel, in the head's order."""
        return list(self.last_layer.genes)

    @property
    def has_expression(self) -> bool:
        """Return whether this is a run of `predict`."""
        states_head = "head" in self.info.get("identity", {})
        return states_head or storage.exists(storage.join(self.uri, HEAD_FILE))

    @property
    def embedding_dim(self) -> int | None:
        """Return the length of the stored embeddings; None if the run stores none."""
        identity = self.info.get("identity", {})
        if not identity.get("store_embeddings", False):
            return None
        # The first releases wrote no length: their embeddings came from a ResNet-50.
        return identity.get("embedding_dim", schemas.EMBEDDING_DIM)

    def cells(self, slide_id: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the CELLS of a slide, by ascending cell_id; no rows if the slide is empty.

        Args:
            slide_id: The slide.
            columns: The columns to read, in this order; all if None.

        Raises:
            ValueError: the slide or a column is unknown, the slide failed, or the file holds
                another table.
        """
        with self.open_table(slide_id, "CELLS", whole=columns is None) as file:
            schema = schemas.cells_schema(self.embedding_dim) if file is None else file.schema_arrow
            source = f"CELLS of slide {slide_id!r}"
            names = schema.names if columns is None else check_names(columns, schema.names, source)
            if file is None:
                return schema.empty_table().select(names)
            return read_rows(file, names)

    def cells_frame(
        self, slide_ids: Iterable[str] | None = None, columns: Sequence[str] | None = None
    ) -> pl.DataFrame:
        """Return CELLS of several slides in one frame, without embeddings.

        Args:
            slide_ids: The slides, in this order; all that did not fail if None.
            columns: The columns to read; all but vectors and boxes if None.
        """
        names = [f.name for f in schemas.CELL_FIELDS] if columns is None else list(columns)
        frames = [frame_of(self.cells(slide_id, names)) for slide_id in self.choose(slide_ids)]
        empty = schemas.cells_schema(self.embedding_dim).empty_table()
        return pl.concat(frames) if frames else frame_of(empty.select(names))

    def profiles(self, slide_ids: Iterable[str] | None = None) -> pl.DataFrame:
        """Return PROFILES of slides: n, mean, sd and quantiles by nucleus type and gene.

        Args:
            slide_ids: The slides, in this order; all that have cells if None.

        Raises:
            ValueError: a slide is unknown, failed, or has no profiles: an earlier release finished
                it, or it is of a run of `extract`.
        """
        chosen = self.choose(slide_ids)
        tables = [schemas.PROFILES.empty_table()]
        for slide_id in (s for s in chosen if self.records[s].get("num_cells")):
            record = self.records[slide_id]
            if "PROFILES" not in record.get("files", {}):
                message = (
                    f"slide {slide_id!r} of {self.uri} has no PROFILES: an earlier release "
                    "finished it, or the run has no expression; compute them from run.expression()"
                )
                raise ValueError(message)
            with open_table(self.folder, record, "PROFILES", whole=True) as file:
                tables.append(read_rows(file, schemas.PROFILES.names).cast(schemas.PROFILES))
        return frame_of(pa.concat_tables(tables))

    def choose(self, slide_ids: Iterable[str] | None = None) -> list[str]:
        """Return these slides, or if None all that did not fail, sorted.

        Raises:
            ValueError: a slide has no record, failed, or is named twice.
        """
        if slide_ids is None:
            return [s for s in sorted(self.records) if self.records[s]["status"] != "failed"]
        where = f"{self.uri}: slides with a record"
        chosen = check_names(list(slide_ids), sorted(self.records), where)
        for slide_id in chosen:
            self._record(slide_id)
        return chosen

    def choose_genes(self, genes: Genes = None) -> list[str]:
        """Return these genes, or if None the whole panel.

        Raises:
            ValueError: a gene is not in the panel or is named twice, or the run has no head.
        """
        return list(layer_of(self, genes).genes)

    def embeddings(self, slide_id: str) -> NDArray[np.float16]:
        """Return the embeddings of a slide's cells, float16 [N, D], in the order of `cells`."""
        if self.embedding_dim is None:
            message = f"{self.uri}: this run stores no embeddings: set store_embeddings: true"
            raise ValueError(message)
        return vector_matrix(self.cells(slide_id, ["embedding"])["embedding"])

    def iter_expression(
        self, genes: Genes, slide_id: str, cell_ids: CellIds = None, what: What = "mean"
    ) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
        """Yield expression in blocks of bounded memory, in the stored order of cells.

        Args:
            genes: The genes, in this order; the whole panel if None.
            slide_id: The slide.
            cell_ids: The cells; all if None.
            what: 'mean', or 'sd' for the standard deviation over the members of an ensemble.

        Yields:
            slide_id and cell_id of N cells, and their expression float32 [N, G].

        Raises:
            ValueError: the slide, a gene or a cell is unknown, the slide failed, or the run has no
                head.
        """
        yield from iter_expression(self, genes, slide_id, cell_ids, what)

    def expression_numpy(
        self, genes: Genes, slide_id: str, cell_ids: CellIds = None, what: What = "mean"
    ) -> NDArray[np.float32]:
        """Return expression float32 [N, G], genes and cells in the order of the arguments.

        Arguments and errors are those of `iter_expression`. A cell may be named several times.
        """
        return read_expression(self, genes, slide_id, cell_ids, what)[1]

    def expression_arrow(self, genes: Genes, slide_id: str, cell_ids: CellIds = None) -> pa.Table:
        """Return `expression_numpy` as slide_id, cell_id and one float32 column per gene."""
        ids, values_NG = read_expression(self, genes, slide_id, cell_ids)
        names = self.choose_genes(genes)
        columns = {"slide_id": pa.repeat(slide_id, len(ids)), "cell_id": pa.array(ids)}
        by_gene = {g: pa.array(np.ascontiguousarray(values_NG[:, i])) for i, g in enumerate(names)}
        return pa.table(columns | by_gene)

    @overload
    def expression(self, genes: Genes, slide_id: None = None) -> pl.LazyFrame: ...
    @overload
    def expression(self, genes: Genes, slide_id: str, cell_ids: CellIds = None) -> pl.DataFrame: ...
    def expression(
        self, genes: Genes, slide_id: str | None = None, cell_ids: CellIds = None
    ) -> pl.DataFrame | pl.LazyFrame:
        """Return `expression_arrow` as a polars frame; without a slide, a lazy one of all slides.

        A lazy frame computes the genes and slides that a query uses, in bounded memory. It keeps
        the hidden factors unpacked in the node's cache, 512 bytes a cell, for further genes.
        """
        if slide_id is None:
            digests = {s: self._digest(s) for s in self.choose()}
            return lazy_expression(self, self.choose_genes(genes), digests)
        return frame_of(self.expression_arrow(genes, slide_id, cell_ids))

    def _digest(self, slide_id: str) -> str | None:
        """Return the SHA-256 of a slide's EXPRESSION; None from earlier releases."""
        stamp = stamp_in(self.records[slide_id], "EXPRESSION")
        return None if stamp is None else stamp.sha256

    def _record(self, slide_id: str) -> SlideRecord:
        """Return the record of a slide that did not fail."""
        if slide_id not in self.records:
            check_names([slide_id], sorted(self.records), f"{self.uri}: slides with a record")
        record = self.records[slide_id]
        if record["status"] == "failed":
            message = (
                f"slide {slide_id!r} failed at {record.get('stage')} with "
                f"{record.get('error_type')}: {record.get('error')}. Fix its file and run the same "
                "command again."
            )
            raise ValueError(message)
        return record

    @contextmanager
    def open_table(
        self, slide_id: str, name: str, *, whole: bool = False
    ) -> Iterator[pq.ParquetFile | None]:
        """Open a slide's table; None if the slide has no cells. Arguments: as `open_table`."""
        tables = self._record(slide_id).get("tables")
        if tables is None:
            remedy = "remove it and run the same command again, which does the slide again"
            uri = self.folder.record_uri(slide_id)
            raise storage.DamagedFileError(uri, "does not say which tables exist", remedy)
        if name not in tables:
            if tables:
                message = f"slide {slide_id!r} of {self.uri} has no {name}: run predict"
                raise ValueError(message)
            yield None
            return
        with open_table(self.folder, self.records[slide_id], name, whole=whole) as file:
            yield file


def open_run(uri: str | os.PathLike[str]) -> Run:
    """Open the folder that `extract` or `predict` wrote, finished or not.

    Args:
        uri: Local path or fsspec URI.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a newer release wrote the run.
    """
    folder = os.fspath(uri).rstrip("/")
    run_uri = storage.join(folder, RUN_FILE)
    if not storage.exists(run_uri):
        message = f"{folder}: no run of scellst_ray (it has no run.json); give the --out of a run"
        raise FileNotFoundError(message)
    info = read_run_info(run_uri)
    version = info.get("format_version", schemas.FORMAT_VERSION)
    if version > schemas.FORMAT_VERSION:
        message = (
            f"{folder}: written in format version {version}; this release reads up "
            f"to {schemas.FORMAT_VERSION}. Upgrade scellst_ray."
        )
        raise ValueError(message)
    run = RunFolder(folder, info["digest"])
    return Run(run, info, run.records())
