"""Paint the pixels of a synthetic slide: hematoxylin and eosin by the Beer-Lambert law.

The slide is painted in blocks on a fixed grid, each with its own random stream. So a region has the
same pixels whatever box is painted, and memory does not grow with the slide.
"""

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from scellst_ray.core.geometry import Box
from scellst_ray.slides.synthetic.config import SyntheticConfig
from scellst_ray.slides.synthetic.layout import (
    SmoothField,
    TissueLayout,
    lattice_shape,
    type_probabilities,
)

BLOCK_PX = 512
_TEXTURE_PX = 512
_TEXTURE_MPP = 0.5
_BLUR_UM = 0.3
_NOISE_SHIFTS = 128  # each block cuts its sensor noise from a larger sheet, at a random shift in px
_NUCLEUS_REACH_UM = 13.0
_CONCENTRATION_UNIT = 80.0  # canvas steps per unit of hematoxylin: 8 bits reach 3.2
_FRACTION_BITS = 4

# Values by type, in the order of NUCLEUS_TYPES: hematoxylin of rim and interior, width of the rim
# as a share of the radius, and graininess of the chromatin.
_RIM = np.array([1.25, 1.75, 1.15, 1.20])
_INTERIOR = np.array([0.80, 1.85, 1.25, 1.05])
_RIM_WIDTH = np.array([0.16, 0.20, 0.25, 0.14])
_GRAIN = np.array([0.10, 0.10, 0.10, 0.22])
# Tissue between nuclei, by type of region: eosin, hematoxylin haze, contrast of the fibres.
_GROUND = np.array([[0.42, 0.15, 0.08], [0.30, 0.10, 0.10], [0.55, 0.04, 0.75], [0.45, 0.12, 0.08]])


class SlidePainter:
    """Painter of the regions of one layout, at the mpp of its configuration."""

    def __init__(self, layout: TissueLayout) -> None:
        """Compute stain colours, textures and the fields of the tissue between nuclei.

        Args:
            layout: Tissue and nuclei to paint.
        """
        self._layout = layout
        config = layout.config
        rng = config.stain_stream("stain")
        hematoxylin = np.array([0.65, 0.70, 0.29]) + rng.normal(0, (0.03, 0.02, 0.03))
        eosin = np.array([0.09, 0.93, 0.27]) + rng.normal(0, (0.02, 0.03, 0.05))
        hematoxylin *= rng.uniform(0.92, 1.12) / np.linalg.norm(hematoxylin)
        eosin *= rng.uniform(0.85, 1.2) / np.linalg.norm(eosin)
        self._optical_density = np.stack([hematoxylin, eosin], axis=1).astype(np.float32)
        self._white = (np.array([243.0, 242.0, 244.0]) + rng.normal(0, 1.5, 3)).astype(np.float32)
        self._fibres = _texture(config, "fibres", (7.0, 0.8))
        clumps, grain = (
            _texture(config, *a) for a in (("clumps", (1.6, 1.6)), ("grain", (0.45, 0.45)))
        )
        self._clumps_and_grain = np.stack([clumps, grain], axis=2)
        spare = (BLOCK_PX + _NOISE_SHIFTS, BLOCK_PX + _NOISE_SHIFTS, 3)
        self._noise = 1.4 * config.stain_stream("noise").standard_normal(spare, np.float32)
        self._ground = _ground_fields(layout)
        self._nucleoli = config.stream("nucleoli").uniform(-1, 1, (len(layout.nuclei), 2, 2))
        centroids = layout.nuclei.centroid_um
        self._tree = cKDTree(centroids) if len(centroids) else None

    def region(self, box: Box) -> NDArray[np.uint8]:
        """Return the pixels uint8 [h0, w0, 3] of a box that lies on the slide.

        Raises:
            ValueError: The box reaches beyond the slide.
        """
        config = self._layout.config
        right0, bottom0 = box.x0 + box.w0, box.y0 + box.h0
        if min(box) < 0 or right0 > config.width0 or bottom0 > config.height0:
            message = (
                f"{box} reaches beyond the slide of {config.width0} x {config.height0} px; "
                "give a box inside"
            )
            raise ValueError(message)
        out = np.empty((box.h0, box.w0, 3), np.uint8)
        for row in range(box.y0 // BLOCK_PX, -(-bottom0 // BLOCK_PX)):
            for column in range(box.x0 // BLOCK_PX, -(-right0 // BLOCK_PX)):
                block = self._block(row, column)
                x0, y0 = column * BLOCK_PX, row * BLOCK_PX
                left, top = max(x0, box.x0), max(y0, box.y0)
                end_x, end_y = min(x0 + BLOCK_PX, right0), min(y0 + BLOCK_PX, bottom0)
                out[top - box.y0 : end_y - box.y0, left - box.x0 : end_x - box.x0] = block[
                    top - y0 : end_y - y0, left - x0 : end_x - x0
                ]
        return out

    def _block(self, row: int, column: int) -> NDArray[np.uint8]:
        """Return one whole block of the grid, also where it reaches beyond the slide."""
        config = self._layout.config
        blur_px = _BLUR_UM / config.mpp
        margin = int(np.ceil(4 * blur_px)) + 1
        side = BLOCK_PX + 2 * margin
        x0, y0 = column * BLOCK_PX - margin, row * BLOCK_PX - margin
        pixel = np.arange(side, dtype=np.float64) + 0.5
        x_um = (pixel + x0) * config.mpp
        y_um = (pixel + y0) * config.mpp
        concentrations = self._concentrations(x_um, y_um, x0, y0)
        light = cv2.exp(-cv2.transform(concentrations, self._optical_density))
        light = cv2.GaussianBlur(light, (2 * margin + 1, 2 * margin + 1), blur_px)
        light = light[margin:-margin, margin:-margin] * self._white
        shift = config.stain_stream("noise", row, column).integers(0, _NOISE_SHIFTS, 2)
        light += self._noise[shift[0] : shift[0] + BLOCK_PX, shift[1] : shift[1] + BLOCK_PX]
        return np.asarray(cv2.convertScaleAbs(light))  # rounds and saturates

    def _concentrations(
        self, x_um: NDArray[np.float64], y_um: NDArray[np.float64], x0: int, y0: int
    ) -> NDArray[np.float32]:
        """Return hematoxylin and eosin, float32 [H, W, 2], of one square.

        Args:
            x_um: Pixel centres along x in um, [W].
            y_um: Pixel centres along y in um, [H].
            x0: Left edge of the square in level-0 px.
            y0: Top edge of the square in level-0 px.
        """
        config = self._layout.config
        inside_x, inside_y = np.clip(x_um, 0, config.width_um), np.clip(y_um, 0, config.height_um)
        edge_um = self._layout.edge_um.on_grid(inside_x, inside_y)
        if edge_um.max() <= 0:
            return np.zeros((*edge_um.shape, 2), np.float32)
        tissue = np.clip(edge_um / 7.0, 0, 1)
        tissue *= tissue * (3 - 2 * tissue)  # smoothstep
        eosin, haze, contrast = (field.on_grid(inside_x, inside_y) for field in self._ground)
        shift_um = self._layout.fibre_shift_um.on_grid(inside_x, inside_y)
        across = np.broadcast_to(x_um.astype(np.float32), tissue.shape)
        down = np.broadcast_to(y_um.astype(np.float32)[:, None], tissue.shape)
        fibres = _sample(self._fibres, across, down + shift_um)
        clumps, grain = cv2.split(_sample(self._clumps_and_grain, across, down))
        nuclear, graininess, covered = cv2.split(self._nuclei(x0, y0, len(x_um)))
        eosin *= np.clip(1 + contrast * fibres, 0.25, 1.9) + 0.14 * clumps
        eosin *= tissue * (1 - 0.55 * covered)
        haze *= tissue * (1 + 0.3 * clumps) * (1 - covered)
        hematoxylin = nuclear + graininess * (grain + 0.5 * clumps) + haze
        return np.maximum(cv2.merge([hematoxylin, eosin]), 0)

    def _nuclei(self, x0: int, y0: int, side: int) -> NDArray[np.float32]:
        """Draw the nuclei of a square of `side` px at (x0, y0) with antialiased outlines.

        Returns:
            float32 [side, side, 3]: hematoxylin, its graininess, and the covered share, 0 to 1.
        """
        mpp = self._layout.config.mpp
        fine = int(np.clip(round(mpp / 0.125), 2, 6))  # fine px per px
        canvas = np.zeros((side * fine, side * fine, 3), np.uint8)
        scale = fine / mpp
        # Whole coordinates are pixel centres in OpenCV.
        shift = np.array([x0, y0]) * fine + 0.5
        for index in self._near(x0, y0, side):
            for outline_um, colour in self._parts(index):
                fixed = np.rint((outline_um * scale - shift) * (1 << _FRACTION_BITS))
                cv2.fillPoly(canvas, [fixed.astype(np.int32)], colour, cv2.LINE_8, _FRACTION_BITS)
        small = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
        unit = (1 / _CONCENTRATION_UNIT, 1 / _CONCENTRATION_UNIT, 1 / 255)
        return np.asarray(small * np.array(unit, np.float32))

    def _near(self, x0: int, y0: int, side: int) -> list[int]:
        """Return the indices, ascending, of nuclei that may touch the square at (x0, y0)."""
        if self._tree is None:
            return []
        mpp = self._layout.config.mpp
        centre = ((x0 + side / 2) * mpp, (y0 + side / 2) * mpp)
        reach = side / 2 * mpp + _NUCLEUS_REACH_UM
        return sorted(self._tree.query_ball_point(centre, reach, p=np.inf))

    def _parts(self, index: int) -> list[tuple[NDArray[np.float64], tuple[float, float, float]]]:
        """Return the parts of one nucleus, outermost first, as (outline in um, colour)."""
        nuclei = self._layout.nuclei
        kind = nuclei.type_index[index]
        centre, outline = nuclei.centroid_um[index], nuclei.outline_um[index]
        unit = _CONCENTRATION_UNIT * nuclei.stain[index]
        grain = float(unit * _GRAIN[kind])
        inner = centre + (1 - _RIM_WIDTH[kind]) * (outline - centre)
        parts = [
            (outline, (float(unit * _RIM[kind]), grain, 255.0)),
            (inner, (float(unit * _INTERIOR[kind]), grain, 255.0)),
        ]
        if kind == 0:  # vesicular nuclei show nucleoli
            for offset in self._nucleoli[index, : 1 + index % 2]:
                spot = centre + 2.2 * offset + 0.2 * (outline[::3] - centre)
                parts.append((spot, (float(unit * 1.6), grain, 255.0)))
        return parts


def _ground_fields(layout: TissueLayout) -> tuple[SmoothField, ...]:
    """Return eosin, haze and fibre contrast of the tissue as fields on a lattice of 16 um."""
    config, spacing = layout.config, 16.0
    rows, columns = lattice_shape(config, spacing)
    y, x = np.meshgrid(
        (np.arange(rows) - 1) * spacing, (np.arange(columns) - 1) * spacing, indexing="ij"
    )
    points = np.clip(
        np.stack([x.ravel(), y.ravel()], axis=1), 0, (config.width_um, config.height_um)
    )
    ground = type_probabilities(layout.type_scores, points) @ _GROUND
    rng = config.stream("ground")
    ground[:, 0] *= 1 + 0.08 * rng.standard_normal(len(ground))
    ground[:, 1] *= 1 + 0.15 * rng.standard_normal(len(ground))
    return tuple(SmoothField(column.reshape(rows, columns), spacing) for column in ground.T)


def _texture(
    config: SyntheticConfig, name: str, sigma_um: tuple[float, float]
) -> NDArray[np.float32]:
    """Return periodic noise of mean 0 and variance 1, smoothed by `sigma_um` along x and y."""
    white = config.stream(name).standard_normal((_TEXTURE_PX, _TEXTURE_PX))
    frequency = 2 * np.pi * np.fft.fftfreq(_TEXTURE_PX, _TEXTURE_MPP)
    exponent = (sigma_um[0] * frequency) ** 2 + (sigma_um[1] * frequency[:, None]) ** 2
    smooth = np.fft.ifft2(np.fft.fft2(white) * np.exp(-exponent / 2)).real
    smooth -= smooth.mean()
    return np.asarray((smooth / smooth.std()).astype(np.float32))


def _sample(
    texture: NDArray[np.float32], x_um: NDArray[np.float32], y_um: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the values of a periodic texture at points in um, [H, W]."""
    turns_x = x_um * np.float32(1 / (_TEXTURE_MPP * _TEXTURE_PX))
    turns_y = y_um * np.float32(1 / (_TEXTURE_MPP * _TEXTURE_PX))
    column = (turns_x - np.floor(turns_x)) * np.float32(_TEXTURE_PX)
    row = (turns_y - np.floor(turns_y)) * np.float32(_TEXTURE_PX)
    return np.asarray(cv2.remap(texture, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP))
