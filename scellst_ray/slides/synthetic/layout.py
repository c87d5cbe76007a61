"""Lay out the tissue and the nuclei of a synthetic slide: exact geometry, no pixels.

All lengths are in um from the slide's top left corner, so the layout does not depend on mpp.
N: nuclei; V: vertices of an outline; M: candidates for nuclei.
"""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from scellst_ray.slides.synthetic.config import NUCLEUS_TYPES, SyntheticConfig

# Values by type, in the order of NUCLEUS_TYPES: mean semi-axes in um, their log spread, the spread
# of the outline's harmonics, and the relative density of nuclei in a region of the type.
_SEMI_MAJOR_UM = np.array([6.1, 3.3, 6.4, 4.7])
_SEMI_MINOR_UM = np.array([5.2, 3.1, 2.3, 3.9])
_SIZE_SD = np.array([0.13, 0.06, 0.10, 0.10])
_HARMONIC_SD = np.array([0.030, 0.012, 0.020, 0.020])
_RELATIVE_DENSITY = np.array([0.8, 1.0, 0.6, 0.9])
_NUM_VERTICES = 36
_CANDIDATES_PER_NUCLEUS = 6
# Centroids keep this distance to the tissue's edge, so that nuclei lie inside the tissue.
_EDGE_CLEARANCE_UM = 10.0


@dataclass(frozen=True)
class SmoothField:
    """A smooth function of the plane: uniform cubic B-splines on a square lattice.

    Attributes:
        coefficients: float64 [rows, columns]; node (0, 0) lies at (-1, -1) spacing.
        spacing_um: Distance between nodes in um.
    """

    coefficients: NDArray[np.float64]
    spacing_um: float

    def at(self, points_um: NDArray[np.float64]) -> NDArray[np.float64]:
        """Evaluate at points [N, 2] (x, y, um); returns [N]."""
        column, weights_x = _spline_taps(points_um[:, 0] / self.spacing_um)
        row, weights_y = _spline_taps(points_um[:, 1] / self.spacing_um)
        total = np.zeros(len(points_um))
        for j in range(4):
            for i in range(4):
                total += weights_y[:, j] * weights_x[:, i] * self.coefficients[row + j, column + i]
        return total

    def on_grid(self, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> NDArray[np.float32]:
        """Evaluate on the grid of `x_um` [W] and `y_um` [H]; returns float32 [H, W]."""
        column, weights_x = _spline_taps(x_um / self.spacing_um)
        row, weights_y = _spline_taps(y_um / self.spacing_um)
        first_column, first_row = int(column.min()), int(row.min())
        part = self.coefficients[first_row : row.max() + 4, first_column : column.max() + 4]
        left = _dense(row - first_row, weights_y, part.shape[0])
        right = _dense(column - first_column, weights_x, part.shape[1])
        return np.asarray(left @ (part.astype(np.float32) @ right.T))


def lattice_shape(config: SyntheticConfig, spacing_um: float) -> tuple[int, int]:
    """Return (rows, columns) of a lattice that covers the slide and a margin of 64 um."""
    height, width = config.height_um + 64, config.width_um + 64
    return int(np.ceil(height / spacing_um)) + 4, int(np.ceil(width / spacing_um)) + 4


def random_field(config: SyntheticConfig, name: str, spacing_um: float) -> SmoothField:
    """Return a random field of mean 0 and variance about 1 that varies over `spacing_um`."""
    normal = config.stream(name).standard_normal(lattice_shape(config, spacing_um))
    # In 1-d the squared spline weights sum to 0.479 on average, so in 2-d the deviation is 0.479.
    return SmoothField(normal / 0.479, spacing_um)


@dataclass(frozen=True)
class SyntheticNuclei:
    """N nuclei of the true layout, in um, (x, y).

    Attributes:
        outline_um: Outline polygons, not closed, float64 [N, V, 2].
        centroid_um: Centroid of each polygon, float64 [N, 2].
        area_um2: Area of each polygon, float64 [N].
        type_index: Index into NUCLEUS_TYPES, int64 [N].
        stain: Hematoxylin relative to the type's mean, float64 [N].
        angle: Direction of the long axis in radians, from x towards y, float64 [N].
    """

    outline_um: NDArray[np.float64]
    centroid_um: NDArray[np.float64]
    area_um2: NDArray[np.float64]
    type_index: NDArray[np.int64]
    stain: NDArray[np.float64]
    angle: NDArray[np.float64]

    def __len__(self) -> int:
        """Return the number of nuclei."""
        return len(self.area_um2)


@dataclass(frozen=True)
class TissueLayout:
    """Tissue outline, type regions, fibre direction and nuclei of one slide.

    Attributes:
        config: Configuration of the slide.
        edge_um: Approximate distance to the tissue's edge in um, positive inside.
        type_scores: One field per nucleus type; `type_probabilities` turns them into shares.
        fibre_shift_um: Displacement along y that bends horizontal fibres.
        nuclei: Nuclei of the slide.
    """

    config: SyntheticConfig
    edge_um: SmoothField
    type_scores: tuple[SmoothField, ...]
    fibre_shift_um: SmoothField
    nuclei: SyntheticNuclei


def make_layout(config: SyntheticConfig) -> TissueLayout:
    """Return the tissue and the nuclei that a configuration gives."""
    edge = _tissue_edge(config)
    scores = tuple(random_field(config, f"type {name}", 190.0) for name in NUCLEUS_TYPES)
    unit = random_field(config, "fibre", 110.0)
    fibre = SmoothField(unit.coefficients * 35.0, unit.spacing_um)
    nuclei = _place_nuclei(config, edge, scores, fibre)
    return TissueLayout(config, edge, scores, fibre, nuclei)


def type_probabilities(
    scores: tuple[SmoothField, ...], points_um: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the probability of each type, [N, 4], at points [N, 2] in um.

    Every type has at least 3 % everywhere, since real regions are never pure.
    """
    logits = 3.0 * np.stack([score.at(points_um) for score in scores], axis=1)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
    return np.asarray(0.88 * softmax + 0.03)


def _tissue_edge(config: SyntheticConfig) -> SmoothField:
    """Return the distance to the edge of the tissue: two wavy blobs off the slide's border.

    The gap to the border is 4 % of the slide's shorter side.
    """
    rng = config.stream("tissue")
    size = np.array([config.width_um, config.height_um])
    spacing = float(np.clip(size.min() / 64, 4.0, 32.0))
    rows, columns = lattice_shape(config, spacing)
    y, x = np.meshgrid(
        (np.arange(rows) - 1) * spacing, (np.arange(columns) - 1) * spacing, indexing="ij"
    )
    points = np.stack([x.ravel(), y.ravel()], axis=1)
    main = (size * rng.uniform(0.45, 0.53, 2), size * rng.uniform(0.37, 0.43, 2))
    corner = rng.integers(0, 2, 2) * 0.68 + 0.16
    satellite = (size * corner, size * rng.uniform(0.08, 0.12, 2))
    inside = np.maximum(
        *[
            (1 - np.hypot(*((points - centre) / radii).T)) * radii.mean()
            for centre, radii in (main, satellite)
        ]
    )
    wave = float(np.clip(size.min() / 6, 40.0, 400.0))
    clipped = np.clip(points, 0, size)  # the lattice of the waves ends near the slide
    inside += 0.16 * wave * random_field(config, "outline", wave / 2).at(clipped)
    to_border = np.minimum(points, size - points).min(axis=1) - 0.04 * size.min()
    return SmoothField(np.minimum(inside, to_border).reshape(rows, columns), spacing)


def _place_nuclei(
    config: SyntheticConfig,
    edge: SmoothField,
    scores: tuple[SmoothField, ...],
    fibre: SmoothField,
) -> SyntheticNuclei:
    """Return nuclei at random places, none too near another or across the tissue's edge.

    Candidates come in random order; one too near an earlier one is dropped. Distances are those of
    capsules (segments with a radius) that contain the outlines.
    """
    rng = config.stream("nuclei")
    centre, kind, num_wanted = _draw_candidates(config, rng, edge, scores)
    num = len(centre)
    size = np.exp(rng.normal(0, 1, num) * _SIZE_SD[kind])
    stretch = np.exp(rng.normal(0, 0.08, num))
    major, minor = _SEMI_MAJOR_UM[kind] * size * stretch, _SEMI_MINOR_UM[kind] * size / stretch
    major, minor = np.maximum(major, minor), np.minimum(major, minor)
    along_fibre = _fibre_angle(fibre, centre) + rng.normal(0, 0.15, num)
    angle = np.where(kind == 2, along_fibre, rng.uniform(0, np.pi, num))
    amplitude = rng.normal(0, 1, (num, 3)) * (_HARMONIC_SD[kind, None] / (1.0, 1.5, 2.0))
    phase = rng.uniform(0, 2 * np.pi, (num, 3))
    stain = np.exp(rng.normal(0, 0.13, num))

    bulge = 1 + np.abs(amplitude).sum(axis=1)
    accepted = _without_conflicts(
        centre, angle, (major - minor) * bulge, minor * bulge, config.min_gap_um
    )[:num_wanted]
    outline = _outlines(
        centre[accepted],
        np.stack([major, minor], axis=1)[accepted],
        angle[accepted],
        amplitude[accepted],
        phase[accepted],
    )
    whole = edge.at(outline.reshape(-1, 2)).reshape(-1, _NUM_VERTICES).min(axis=1) > 0
    outline, accepted = outline[whole], accepted[whole]
    polygons = shapely.polygons(outline)
    centroid = shapely.get_coordinates(shapely.centroid(polygons)).reshape(-1, 2)
    area = np.asarray(shapely.area(polygons), np.float64).reshape(-1)
    return SyntheticNuclei(
        outline, centroid, area, kind[accepted], stain[accepted], angle[accepted]
    )


def _draw_candidates(
    config: SyntheticConfig,
    rng: np.random.Generator,
    edge: SmoothField,
    scores: tuple[SmoothField, ...],
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """Return candidate centres [M, 2] in um, their types [M], and how many to keep at most."""
    area_mm2 = config.width_um * config.height_um / 1e6
    num_candidates = round(_CANDIDATES_PER_NUCLEUS * config.cells_per_mm2 * area_mm2)
    centre = rng.uniform(0, 1, (num_candidates, 2)) * (config.width_um, config.height_um)
    centre = centre[edge.at(centre) > _EDGE_CLEARANCE_UM]
    num_wanted = round(len(centre) / _CANDIDATES_PER_NUCLEUS)
    cumulative = np.cumsum(type_probabilities(scores, centre), axis=1)
    kind = (rng.uniform(0, 1, (len(centre), 1)) > cumulative[:, :3]).sum(axis=1)
    kept = rng.uniform(0, 1, len(centre)) < _RELATIVE_DENSITY[kind]
    return centre[kept], kind[kept].astype(np.int64), num_wanted


def _outlines(
    centre: NDArray[np.float64],
    axes: NDArray[np.float64],
    angle: NDArray[np.float64],
    amplitude: NDArray[np.float64],
    phase: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return outlines [N, V, 2]: ellipses whose radius the harmonics 2, 3 and 4 modulate."""
    turn = np.arange(_NUM_VERTICES) * (2 * np.pi / _NUM_VERTICES)
    radius = np.ones((len(centre), _NUM_VERTICES))
    for k, order in enumerate((2, 3, 4)):
        radius += amplitude[:, k, None] * np.cos(order * turn + phase[:, k, None])
    along = axes[:, :1] * np.cos(turn) * radius
    across = axes[:, 1:] * np.sin(turn) * radius
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
    turned = np.stack([along * cosine - across * sine, along * sine + across * cosine], axis=2)
    return np.asarray(turned + centre[:, None, :])


def _without_conflicts(
    centre: NDArray[np.float64],
    angle: NDArray[np.float64],
    half_length: NDArray[np.float64],
    radius: NDArray[np.float64],
    gap: float,
) -> NDArray[np.int64]:
    """Return the indices of the capsules that keep `gap` to every kept capsule before them."""
    if len(centre) == 0:
        return np.zeros(0, np.int64)
    reach = 2 * float((half_length + radius).max()) + gap
    pairs = cKDTree(centre).query_pairs(reach, output_type="ndarray")
    i, j = pairs.min(axis=1), pairs.max(axis=1)
    near = np.hypot(*(centre[j] - centre[i]).T)
    close = near < (half_length + radius)[i] + (half_length + radius)[j] + gap
    i, j = i[close], j[close]
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    distance = np.full(len(i), np.inf)
    for one, other in ((i, j), (j, i)):
        for end in (-1.0, 0.0, 1.0):
            point = centre[one] + end * half_length[one, None] * direction[one]
            offset = point - centre[other]
            along = (offset * direction[other]).sum(axis=1)
            along = np.clip(along, -half_length[other], half_length[other])
            apart = np.hypot(*(offset - along[:, None] * direction[other]).T)
            distance = np.minimum(distance, apart)
    conflict = distance < radius[i] + radius[j] + gap
    i, j = i[conflict], j[conflict]
    order = np.argsort(j, kind="stable")
    is_kept = np.ones(len(centre), bool)
    for first, second in zip(i[order].tolist(), j[order].tolist(), strict=True):
        if is_kept[first]:
            is_kept[second] = False
    return np.flatnonzero(is_kept)


def _fibre_angle(fibre: SmoothField, points_um: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the direction of the fibres in radians: along it, y + fibre shift is constant."""
    step = 2.0
    here = fibre.at(points_um)
    slope_x = (fibre.at(points_um + np.array([step, 0.0])) - here) / step
    slope_y = (fibre.at(points_um + np.array([0.0, step])) - here) / step
    return np.asarray(np.arctan2(-slope_x, 1 + slope_y))


def _spline_taps(
    position: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the first of 4 nodes, [N], and the weights of the cubic B-spline, [N, 4]."""
    first = np.floor(position).astype(np.int64)
    t = position - first
    weights = np.stack(
        [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1
    )
    return first, weights / 6


def _dense(
    first: NDArray[np.int64], weights: NDArray[np.float64], num_nodes: int
) -> NDArray[np.float32]:
    """Return nodes and weights of `_spline_taps` as a dense matrix [N, num_nodes]."""
    matrix = np.zeros((len(first), num_nodes), np.float32)
    rows = np.arange(len(first))
    for k in range(4):
        matrix[rows, first + k] = weights[:, k]
    return matrix
