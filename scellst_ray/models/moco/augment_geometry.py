"""Geometric operations of augmented views: index maps, one matrix per axis, rectangles.

A view is a randomly changed copy of a square crop.

Shape letters: C channels, N samples, K samples with an erased rectangle, H W pixels of a view,
O side of a view in px (rows or columns of a matrix).
"""

import torch
from torch import Tensor


def rotation_index(angle_deg_N: Tensor, side_px: int, out_px: int) -> Tensor:
    """Return, for each pixel of a rotated centre crop, the pixel of the crop that it shows.

    Rotation is counter-clockwise about the centre and takes the nearest pixel, as PIL does.

    Args:
        angle_deg_N: Rotation of each sample in degrees; the result lies on the same device.
        side_px: Side of the crops.
        out_px: Side of the views. It must be small enough that no corner leaves the crop.

    Returns:
        row * side_px + column, [N, out_px * out_px], int32.
    """
    angle_N1 = angle_deg_N.deg2rad()[:, None]
    cos_N1, sin_N1 = angle_N1.cos().float(), angle_N1.sin().float()
    edge_px = round((side_px - out_px) / 2)
    from_centre = torch.arange(out_px, device=angle_N1.device) + (edge_px + 0.5 - side_px / 2)
    dy, dx = (
        grid.reshape(1, -1) for grid in torch.meshgrid(from_centre, from_centre, indexing="ij")
    )
    column = (cos_N1 * dx).sub_(sin_N1 * dy).add_(side_px / 2).int()
    row = (sin_N1 * dx).add_(cos_N1 * dy).add_(side_px / 2).int()
    return row.mul_(side_px).add_(column).clamp_(0, side_px**2 - 1)


def resize_matrix(start_N: Tensor, length_N: Tensor, flipped_N: Tensor, out_px: int) -> Tensor:
    """Return the matrix that enlarges an interval of an axis to the whole axis, [N, O, O].

    Interpolation is bilinear as in torchvision's resized_crop: pixel centres lie at halves, and
    edges are repeated. The interval is never longer than the axis, so no smoothing is needed.

    Args:
        start_N: First px of the interval.
        length_N: Length of the interval in px.
        flipped_N: Whether the result is mirrored.
        out_px: Length of the axis in px.
    """
    place_O = torch.arange(out_px, device=start_N.device, dtype=torch.float32)
    place_NO = torch.where(flipped_N[:, None], out_px - 1 - place_O, place_O)
    start_N1, length_N1 = start_N[:, None].float(), length_N[:, None].float()
    source_NO = ((place_NO + 0.5) * (length_N1 / out_px) - 0.5).clamp_min_(0)
    source_NO = torch.minimum(source_NO, length_N1 - 1) + start_N1
    return (source_NO[:, :, None] - place_O).abs_().neg_().add_(1).clamp_min_(0)


def blur_matrix(sigma_N: Tensor, out_px: int) -> Tensor:
    """Return the matrix of PIL's Gaussian blur along one axis, [N, O, O]; edges are repeated.

    PIL blurs three times with a box of fractional width (Gwosdek et al. 2011, equations 7 and 11).
    Therefore the kernel is a piecewise polynomial and not quite a Gaussian.

    Args:
        sigma_N: Standard deviations in px, above 0 and at most a quarter of the axis.
        out_px: Length of the axis in px.
    """
    variance_N = sigma_N.double() ** 2 / 3
    whole_N = (((12 * variance_N + 1).sqrt() - 1) / 2).floor()
    share_N = (2 * whole_N + 1) * (whole_N * (whole_N + 1) - 3 * variance_N)
    share_N = share_N / (6 * (variance_N - (whole_N + 1) ** 2))
    radius_N11 = (whole_N + share_N).float()[:, None, None]
    place_O = torch.arange(out_px, device=sigma_N.device)
    distance_OO = (place_O[:, None] - place_O).abs()
    box_NOO = (radius_N11 + 1 - distance_OO).clamp_(0, 1) / (2 * radius_N11 + 1)
    # Weight of the box outside the axis; the pixel at that end gets it.
    beyond_NO = 1 - box_NOO.sum(2)
    half = out_px // 2
    box_NOO[:, :half, 0] += beyond_NO[:, :half]
    box_NOO[:, half:, -1] += beyond_NO[:, half:]
    return box_NOO @ box_NOO @ box_NOO


def mean_index(side_px: int) -> Tensor:
    """Return the indices of a fifth of a crop's pixels, evenly spread over rows and columns.

    The pixels are a knight's move apart.

    Returns:
        row * side_px + column, int32, on the CPU.
    """
    index = torch.arange(side_px**2, dtype=torch.int32)
    return index[(index % side_px + 2 * (index // side_px)) % 5 == 2]


def erase(views_CNHW: Tensor, boxes_N4: Tensor) -> None:
    """Set each view's rectangle to 0, in place.

    Args:
        views_CNHW: Square views.
        boxes_N4: Top, left, height and width of each rectangle in px, on the CPU. Height 0: none.
    """
    samples = torch.nonzero(boxes_N4[:, 2])[:, 0]
    if not len(samples):
        return
    device = views_CNHW.device
    top, left, height, width = boxes_N4[samples].to(device).T[..., None]
    place = torch.arange(views_CNHW.shape[-1], device=device)
    rows_KH = (place >= top) & (place < top + height)
    columns_KW = (place >= left) & (place < left + width)
    samples = samples.to(device)
    part_CKHW = views_CNHW.index_select(1, samples)
    part_CKHW.masked_fill_(rows_KH[:, :, None] & columns_KW[:, None, :], 0)
    views_CNHW.index_copy_(1, samples, part_CKHW)
