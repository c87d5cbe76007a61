"""Arrow schemas of all tables that are stored or travel between stages; FORMAT.md explains them.

`conform` puts a table into its stored form, with name, version and run digest in the schema
metadata. `check` refuses a stored table of another name, or of a version newer than this release.
"""

from collections.abc import Mapping, Sequence

import pyarrow as pa

FORMAT_VERSION = 1
CROP_UM = 12.0
CROP_PX = 48
# Size of a stored crop: after rotation by any angle, the 12 um in the middle are whole.
STORED_CROP_UM = 18.0
STORED_CROP_PX = 72
# Length of embeddings if a run does not say it: the first releases used a ResNet-50.
EMBEDDING_DIM = 2048
HIDDEN_DIM = 256

# Maps of a segmenting network, one uint32 per pixel. Bits 0-24: edge energy in steps of 2^-24, from
# 0 to MAP_LEVEL. Bit 25: set in nuclei. Bits 26-31: nucleus type.
MAP_LEVEL = 1 << 24
MAP_NUCLEUS = 1 << 25
MAP_TYPE_SHIFT = 26

_BOX_FIELDS = [
    pa.field(f"{kind}_{axis}", pa.int32())
    for kind in ("core", "read")
    for axis in ("x0", "y0", "w0", "h0")
]

# A slide that could not be planned, or has no tissue, is one row with tile_id -1 and num_tiles 0.
TILES = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("tile_id", pa.int64(), nullable=False),
        pa.field("num_tiles", pa.int32(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("mpp", pa.float64()),
        pa.field("read_mpp", pa.float64()),
        pa.field("width0", pa.int32()),
        pa.field("height0", pa.int32()),
        *_BOX_FIELDS,
        pa.field("imported", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
        pa.field("source", pa.string()),
    ]
)

STAGES = ("plan", "read", "network", "segment", "crop", "embed", "write")

RECEIPTS = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("tile_id", pa.int64(), nullable=False),
        pa.field("num_tiles", pa.int32(), nullable=False),
        pa.field("mpp", pa.float64()),
        pa.field("read_mpp", pa.float64()),
        pa.field("width0", pa.int32()),
        pa.field("height0", pa.int32()),
        pa.field("num_cells", pa.int32(), nullable=False),
        pa.field("shard", pa.string()),
        pa.field("shard_row", pa.int64()),
        pa.field("stage", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
        *[pa.field(f"seconds_{stage}", pa.float32()) for stage in STAGES],
        pa.field("waited_s", pa.float32()),
        pa.field("source", pa.string()),
    ]
)

FAILURES = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("tile_id", pa.int64(), nullable=False),
        pa.field("stage", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
    ]
)

CELL_FIELDS = [
    pa.field("slide_id", pa.string(), nullable=False),
    pa.field("cell_id", pa.int64(), nullable=False),
    pa.field("x0", pa.float32(), nullable=False),
    pa.field("y0", pa.float32(), nullable=False),
    pa.field("area_um2", pa.float32(), nullable=False),
    pa.field("nucleus_type", pa.string(), nullable=False),
    pa.field("type_prob", pa.float32()),
    pa.field("polygon", pa.binary(), nullable=False),
]
# Box of the outline, level-0 px. Tables of earlier releases have none.
BBOX = pa.field(
    "bbox",
    pa.struct(
        [pa.field(side, pa.float32(), nullable=False) for side in ("xmin", "ymin", "xmax", "ymax")]
    ),
    nullable=False,
)
# Columns of a shard. `seam` holds bits that say how near a nucleus is to a border of its tile (see
# nuclei/seams.py).
SHARD_FIELDS = [*CELL_FIELDS, pa.field("seam", pa.uint8(), nullable=False)]
PROFILES = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("nucleus_type", pa.string()),
        pa.field("gene", pa.string(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        *[
            pa.field(name, pa.float32(), nullable=False)
            for name in ("mean", "sd", "q05", "q25", "q50", "q75", "q95")
        ],
    ]
)
DIFFERENTIAL_GENES = pa.schema(
    [
        pa.field("nucleus_type", pa.string(), nullable=False),
        pa.field("gene", pa.string(), nullable=False),
        pa.field("num_cells", pa.int64(), nullable=False),
        *[
            pa.field(name, pa.float64(), nullable=False)
            for name in (
                *("scores", "logfoldchanges", "pvals", "pvals_adj"),
                *("mean", "mean_rest", "log2_ratio"),
            )
        ],
    ]
)
AGREEMENT = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("nucleus_type", pa.string(), nullable=False),
        pa.field("best_type", pa.string()),
        pa.field("n", pa.int64(), nullable=False),
    ]
)
# Distance from the cells that the head was trained on (runs/domain_shift.py).
DISTANCE = pa.field("distance", pa.float16(), nullable=False)

CROPS = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("cell_id", pa.int64(), nullable=False),
        pa.field("nucleus_type", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
    ]
)


def vector(name: str, dim: int) -> pa.Field:
    """Return the field of a stored vector column, float16 [dim] per cell."""
    return pa.field(name, pa.list_(pa.field("item", pa.float16()), dim), nullable=False)


def cells_schema(embedding_dim: int | None, *, with_bbox: bool = True) -> pa.Schema:
    """Return the CELLS schema; without an embedding column if `embedding_dim` is None."""
    extra = [] if embedding_dim is None else [vector("embedding", embedding_dim)]
    return pa.schema([*CELL_FIELDS, *extra, *([BBOX] if with_bbox else [])])


def expression_schema(hidden_dim: int = HIDDEN_DIM, *, with_distance: bool = False) -> pa.Schema:
    """Return the EXPRESSION schema, with the head's last hidden layer, float16 [256] per cell.

    In an ensemble the layers of the networks follow each other, so `hidden_dim` is a multiple of
    256. Tables of the first releases have no `distance`.
    """
    extra = [DISTANCE] if with_distance else []
    return pa.schema([*CELL_FIELDS[:2], vector("hidden", hidden_dim), *extra])


def last_layer_schema(hidden_dim: int = HIDDEN_DIM) -> pa.Schema:
    """Return the LAST_LAYER schema: one row for each gene and network of a run's head."""
    weight = pa.list_(pa.field("item", pa.float32()), hidden_dim)
    return pa.schema(
        [
            pa.field("gene", pa.string(), nullable=False),
            pa.field("member", pa.int32(), nullable=False),
            pa.field("weight", weight, nullable=False),
            pa.field("bias", pa.float32(), nullable=False),
            pa.field("scale", pa.float32(), nullable=False),
            pa.field("beta", pa.float32(), nullable=False),
        ]
    )


def scores_schema(columns: Sequence[str]) -> pa.Schema:
    """Return the SCORES schema, with a column of scores for each type; null: not scored."""
    scores = [pa.field(name, pa.float32()) for name in columns]
    return pa.schema([*CELL_FIELDS[:2], pa.field("best_type", pa.string()), *scores])


def bags_schema(embedding_dim: int, *, with_counts: bool = False) -> pa.Schema:
    """Return the BAGS schema: one row per spot with the embeddings of its cells and its target.

    A bag has one vector for each cell of the spot, without padding. `with_counts` adds the two
    columns that losses on counts need.
    """
    embedding = pa.list_(pa.field("item", pa.float16()), embedding_dim)
    counts = [
        pa.field("counts", pa.list_(pa.float32()), nullable=False),
        pa.field("size_factor", pa.float32(), nullable=False),
    ]
    return pa.schema(
        [
            pa.field("slide_id", pa.string(), nullable=False),
            pa.field("spot_id", pa.string(), nullable=False),
            pa.field("x0", pa.float64(), nullable=False),
            pa.field("y0", pa.float64(), nullable=False),
            pa.field("cell_id", pa.list_(pa.int64()), nullable=False),
            pa.field("embedding", pa.list_(embedding), nullable=False),
            pa.field("target", pa.list_(pa.float32()), nullable=False),
            *(counts if with_counts else []),
        ]
    )


def conform(table: pa.Table, schema: pa.Schema, name: str, run_digest: str = "") -> pa.Table:
    """Return `table` with exactly the columns and types of `schema`, signed with its name.

    Raises:
        ValueError: a column is missing or cannot be cast without loss.
    """
    missing = [column for column in schema.names if column not in table.column_names]
    if missing:
        message = f"{name}: columns {', '.join(missing)} are missing; it has {table.column_names}"
        raise ValueError(message)
    return table.select(schema.names).cast(sign_schema(schema, name, run_digest))


def sign_schema(
    schema: pa.Schema, name: str, run_digest: str = "", extra: Mapping[bytes, bytes] | None = None
) -> pa.Schema:
    """Return the schema with table name, format version and run digest in its metadata."""
    metadata = {
        b"scellst_ray.table": name.encode(),
        b"scellst_ray.version": str(FORMAT_VERSION).encode(),
        b"scellst_ray.run_digest": run_digest.encode(),
    }
    return schema.with_metadata(metadata | dict(extra or {}))


def check(schema: pa.Schema, name: str, source: str) -> None:
    """Check that a stored schema is table `name` in a version this release reads.

    Raises:
        ValueError: the schema is of another table, unsigned, or of a newer version. The message
            names `source`.
    """
    metadata = schema.metadata or {}
    found = metadata.get(b"scellst_ray.table", b"").decode()
    if found != name:
        message = (
            f"{source}: expected a scellst_ray {name} table, found {found or 'no signature'}; give "
            "a file that scellst_ray wrote"
        )
        raise ValueError(message)
    version = int(metadata.get(b"scellst_ray.version", b"0"))
    if version > FORMAT_VERSION:
        message = (
            f"{source}: written in format version {version}; this release reads up to "
            f"{FORMAT_VERSION}. Upgrade scellst_ray."
        )
        raise ValueError(message)
