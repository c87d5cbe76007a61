"""The last layer of a run's head as a table, from which SQL alone computes expression."""

import pyarrow as pa

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.models.mil.stored_head import LastLayer

LAST_LAYER_FILE = "last_layer.parquet"


def last_layer_table(layer: LastLayer, run_digest: str) -> pa.Table:
    """Return LAST_LAYER: one row for each gene and network of the head, see FORMAT.md."""
    num_members, num_genes, hidden_dim = layer.weight_KGH.shape
    weight = pa.FixedSizeListArray.from_arrays(pa.array(layer.weight_KGH.reshape(-1)), hidden_dim)
    columns = {
        "gene": layer.genes * num_members,
        "member": pa.array([k for k in range(num_members) for _ in layer.genes], pa.int32()),
        "weight": weight,
        "bias": layer.bias_KG.reshape(-1),
        "scale": layer.scale_KG.reshape(-1),
        "beta": pa.repeat(pa.scalar(layer.formula.beta, pa.float32()), num_members * num_genes),
    }
    schema = schemas.last_layer_schema(hidden_dim)
    return schemas.conform(pa.table(columns), schema, "LAST_LAYER", run_digest)


def write_last_layer(run_uri: str, layer: LastLayer, run_digest: str) -> None:
    """Write LAST_LAYER into a run folder: its digest is not kept, since the head tells its content.

    Args:
        run_uri: The run folder.
        layer: Last layer of the run's head.
        run_digest: Digest of the run; it is also that of tables of this run.
    """
    uri = storage.join(run_uri, LAST_LAYER_FILE)
    storage.publish_table(uri, last_layer_table(layer, run_digest))


def check_last_layer(run_uri: str, layer: LastLayer, run_digest: str) -> None:
    """Check that a run's LAST_LAYER is that of its head, if the run has one.

    Raises:
        DamagedFileError: it is another one, or cannot be read.
    """
    uri = storage.join(run_uri, LAST_LAYER_FILE)
    if not storage.exists(uri):
        return
    schemas.check(storage.read_schema(uri), "LAST_LAYER", uri)
    table, expected = storage.read_table(uri), last_layer_table(layer, run_digest)
    signatures = [t.schema.metadata[b"scellst_ray.run_digest"] for t in (table, expected)]
    if signatures[0] != signatures[1] or not table.equals(expected):
        raise storage.DamagedFileError(uri, "is not the last layer of the run's head")
