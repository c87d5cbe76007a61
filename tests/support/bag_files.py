"""BAGS files of two small slides with planted targets."""

import numpy as np
import pyarrow as pa

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.stages.networks import vectors

DIM, GENES = 16, 5


def write_bag_files(folder):
    """Write BAGS files of 24 and 16 spots.

    Returns:
        (addresses, slide_ids, cells per spot, embeddings, targets, [size factor, counts]).
    """
    rng = np.random.default_rng(0)
    uris, slide_ids, sizes, parts, targets, counts = [], [], [], [], [], []
    for slide_id, num_spots in (("s1", 24), ("s0", 16)):
        num_cells = rng.integers(1, 7, num_spots)
        offsets = np.concatenate([[0], np.cumsum(num_cells)])
        x_LD = rng.normal(size=(offsets[-1], DIM)).astype(np.float16)
        mean_SD = np.add.reduceat(x_LD.astype(float), offsets[:-1]) / num_cells[:, None]
        y_SG = np.exp(mean_SD[:, :GENES]).astype(np.float32)
        factor_S = rng.uniform(0.5, 2, num_spots).astype(np.float32)
        count_SG = rng.poisson(3 * y_SG * factor_S[:, None]).astype(np.float32)
        columns = {
            "slide_id": pa.repeat(slide_id, num_spots),
            "spot_id": [f"spot{i}" for i in range(num_spots)],
            "x0": np.zeros(num_spots),
            "y0": np.zeros(num_spots),
            "cell_id": pa.array([[7] * n for n in num_cells], pa.list_(pa.int64())),
            "embedding": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), vectors(x_LD)),
            "target": pa.array(list(y_SG), pa.list_(pa.float32())),
            "counts": pa.array(list(count_SG), pa.list_(pa.float32())),
            "size_factor": pa.array(factor_S),
        }
        uris.append(str(folder / f"{slide_id}.parquet"))
        schema = schemas.bags_schema(DIM, with_counts=True)
        table = schemas.conform(pa.table(columns), schema, "BAGS")
        storage.publish_table(uris[-1], table)
        slide_ids += [slide_id] * num_spots
        sizes.append(num_cells)
        parts.append(x_LD)
        targets.append(y_SG)
        counts.append(np.column_stack([factor_S, count_SG]))
    return uris, slide_ids, *(np.concatenate(each) for each in (sizes, parts, targets, counts))
