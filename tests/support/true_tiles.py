"""Tiles of slides whose nuclei are known, with the maps a perfect network would give of them.

For tests and benchmarks of all that lies around the network: tiling, post-processing, ownership,
seams, coordinates, compaction.
"""

import numpy as np
import shapely
from scipy.spatial import cKDTree

from scellst_ray import storage
from scellst_ray.core.geometry import Box
from scellst_ray.evaluation.segmentation.rasterise import rasterise
from scellst_ray.nuclei.hv_maps import pack_maps
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.reader import box_frame
from scellst_ray.slides.synthetic.ideal_maps import ideal_maps
from scellst_ray.stages.find import FindNuclei
from scellst_ray.stages.tiles import CellsSpec, box_columns, box_of
from scellst_ray.stages.write import WriteShards

TYPES = ("Background", "Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
CONTEXT_PX = 128  # wider than nuclei: enough to know where those cut by a tile's border end


def truth_spec(core_px=192, halo_px=32):
    """Return what to compute: nuclei of CellViT's maps, no embeddings."""
    return CellsSpec(
        segmenter="cellvit",
        read_mpp=None,
        core_px=core_px,
        halo_px=halo_px,
        encoder="none",
        precision="float32",
        head_uri=None,
        store_embeddings=False,
        type_names=TYPES,
    )


class Truth:
    """The nuclei of a slide, and what a perfect network says of any tile of it."""

    def __init__(self, polygons, types, jitter=0.0, context_px=CONTEXT_PX, window_px=None):
        """Take outlines (shapely, level-0 px) and their types by number.

        Args:
            polygons: Outlines [N].
            types: int [N], 1 to 5.
            jitter: How uncertain the network is, differently in every tile: see `ideal_maps`.
            context_px: How far beyond the tile the network knows nuclei that its border cuts.
            window_px: As in `pack_maps`.
        """
        self.polygons, self.types, self.jitter = polygons, types, jitter
        self.context_px, self.window_px = context_px, window_px
        self.tree = shapely.STRtree(polygons)

    def maps(self, row, side_px):
        """Return the packed maps of a tile, uint32 [side, side]."""
        frame, far = row["frame"], self.context_px
        side = side_px + 2 * far
        corners = frame.to_level0(np.array([[0.0, 0.0], [side, side]]) - far)
        index = np.sort(self.tree.query(shapely.box(*corners.ravel())))
        here = shapely.transform(self.polygons[index], lambda p: frame.from_level0(p) + far)
        labels = rasterise(here, side, side)
        rng = np.random.default_rng(row["tile_id"])
        maps = ideal_maps(labels, self.types[index], len(TYPES), jitter=self.jitter, rng=rng)
        within = np.s_[:, far : side - far, far : side - far]
        return pack_maps(*(np.ascontiguousarray(m[within]) for m in maps), self.window_px)


def run_slide(folder, rows, truth, spec):
    """Take planned tiles through everything but reading and the network."""
    run = RunFolder(str(folder), "d1g")
    for row in rows:
        row["frame"] = box_frame(box_of(row, "read"), row["read_mpp"] / row["mpp"])
        row["maps"] = truth.maps(row, spec.side_px)
    receipts = WriteShards(run)(FindNuclei(spec)(rows))
    assert receipts["error"].null_count == len(rows)
    return finish_slide(run, "s", receipts), storage.read_table(run.cells_uri("s"))


def counted(cells, polygons, limit0):
    """Match cells to true nuclei; return how many nuclei are missed, and how many cells extra."""
    centroids = shapely.get_coordinates(shapely.centroid(polygons))
    found = np.stack([cells["x0"], cells["y0"]], axis=1)
    near, _ = cKDTree(found).query(centroids)
    distance, owner = cKDTree(centroids).query(found)
    lost = int((near > limit0).sum())
    extra = len(found) - len(np.unique(owner[distance <= limit0]))
    return lost, extra


def discs(seed, num, radii0, core_px=192):
    """Return discs that do not touch on 4 x 4 tiles, a third with their centre near a seam."""
    rng = np.random.default_rng(seed)
    side0, centres, sizes = 4 * core_px, np.zeros((0, 2)), np.zeros(0)
    while len(centres) < num:
        centre, radius = rng.uniform(0, side0, 2), rng.uniform(*radii0)
        if rng.random() < 0.33:
            axis = rng.integers(2)
            centre[axis] = core_px * rng.integers(1, 4) + rng.uniform(-4, 4)
        apart = np.hypot(*(centres - centre).T) > sizes + radius + 3
        if apart.all() and (centre > radius + 1).all() and (centre < side0 - radius - 1).all():
            centres, sizes = np.vstack([centres, centre]), np.append(sizes, radius)
    turns = np.linspace(0, 2 * np.pi, 65)[:-1]
    ring = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    return shapely.polygons(centres[:, None] + sizes[:, None, None] * ring)


def square_of_tiles(spec, columns=4):
    """Return the rows of as many rows as columns of tiles, at 0.25 um/px."""
    side, num = spec.core_px, columns**2
    common = {"slide_id": "s", "num_tiles": num, "uri": "none", "mpp": 0.25, "read_mpp": 0.25}
    common |= {"width0": columns * side, "height0": columns * side}
    rows = []
    for tile_id in range(num):
        y, x = divmod(tile_id, columns)
        core = Box(x * side, y * side, side, side)
        rows.append(common | box_columns(core, core.grow(spec.halo_px)) | {"tile_id": tile_id})
    return rows
