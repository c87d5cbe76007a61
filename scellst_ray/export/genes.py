"""Genes of a run as Parquet columns: one file a slide, a few bytes a cell and gene."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.export.cell_blocks import cell_blocks
from scellst_ray.runs.reading import Run
from scellst_ray.runs.tables import stamp_in

ROW_GROUP = 65_536
# Keys of the metadata: digest of the run, and of the table that the genes were computed from.
RUN, EXPRESSION = b"scellst_ray.run_digest", b"scellst_ray.expression"


def genes_uri(out: str, slide_id: str) -> str:
    """Return the file of a slide."""
    return storage.join(out, f"{slide_id}.parquet")


def check_folder(run: Run, out: str, genes: Sequence[str]) -> None:
    """Check that a folder holds nothing but GENES of this run and these genes.

    Raises:
        ValueError: a file there is another one; the message names it and the remedy.
    """
    expected = _schema(run, genes, "")
    for uri in storage.list_files(out):
        try:
            found = storage.read_schema(uri)
        except (OSError, ValueError) as error:
            message = f"{uri}: is no Parquet file of `genes`; give another --out, or remove it"
            raise ValueError(message) from error
        metadata = found.metadata or {}
        is_ours = metadata.get(RUN) == expected.metadata[RUN] and EXPRESSION in metadata
        if not is_ours or not found.equals(expected):
            message = (
                f"{uri}: holds other genes, or is of another run or command; give another --out, "
                "or remove the folder"
            )
            raise ValueError(message)


def is_written(run: Run, out: str, slide_id: str) -> bool:
    """Return whether the file of a slide is there, made of the slide's present EXPRESSION."""
    uri, digest = genes_uri(out, slide_id), _digest(run, slide_id)
    if not digest or not storage.exists(uri):
        return False
    return bool(storage.read_schema(uri).metadata[EXPRESSION] == digest.encode())


def write_genes(run: Run, out: str, slide_id: str, genes: Sequence[str]) -> int:
    """Write the GENES of a slide; return its number of cells.

    Args:
        run: The run.
        out: Folder, a local path or fsspec URI.
        slide_id: The slide.
        genes: The genes, one float32 column each.

    Raises:
        ValueError: the slide failed, a gene is unknown, or a table is damaged.
    """
    schema, count = _schema(run, genes, _digest(run, slide_id)), 0

    def tables() -> Iterator[pa.Table]:
        for block in cell_blocks(run, slide_id, ["slide_id", "cell_id"], genes):
            columns = [pa.array(block.values_NG[:, i].copy()) for i in range(len(genes))]
            ids = [block.cells["slide_id"], block.cells["cell_id"]]
            yield pa.table([*ids, *columns], names=schema.names).cast(schema)

    def write(writer: pq.ParquetWriter) -> None:
        nonlocal count
        for table in tables():
            writer.write_table(table, ROW_GROUP)
            count += len(table)

    storage.publish_stamped(genes_uri(out, slide_id), schema, write, **_encoding(genes))
    return count


def _encoding(genes: Sequence[str]) -> dict[str, object]:
    """Return how columns are encoded: bytes of equal weight together, ids as differences."""
    split = dict.fromkeys(genes, "BYTE_STREAM_SPLIT")
    return {"column_encoding": split | {"cell_id": "DELTA_BINARY_PACKED"}}


def _schema(run: Run, genes: Sequence[str], digest: str) -> pa.Schema:
    ids = schemas.CELL_FIELDS[:2]
    columns = [pa.field(gene, pa.float32(), nullable=False) for gene in genes]
    of_expression = {EXPRESSION: digest.encode()}
    return schemas.sign_schema(
        pa.schema([*ids, *columns]), "GENES", run.folder.digest, of_expression
    )


def _digest(run: Run, slide_id: str) -> str:
    """Return the SHA-256 of the slide's EXPRESSION; '' without cells and from earlier releases."""
    stamp = stamp_in(run.records[slide_id], "EXPRESSION")
    return "" if stamp is None else stamp.sha256
