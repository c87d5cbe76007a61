"""Where the pixels of an augmented view come from: index maps, one matrix per axis, rectangles.

Shape letters: C channels, N samples, K some of them, H W pixels of a view, O sides of a view in px
(rows or columns of a matrix).
"""

import torch
from torch import Tensor


def rotation_index(angle_deg_N: Tensor, side_px: int, out_px: int) -> Tensor:
    """Return the pixel a rotated and centre-cropped view takes each of its pixels from.

    The nearest pixel, as PIL's rotate about the centre; counter-clockwise.

    Args:
        angle_deg_N: Rotation of each sample, on the device wanted.
        side_px: Side of the (square) crops.
        out_px: Side of the views; small enough that no corner leaves the crop.

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
    """Return what enlarges a stretch of an axis to the whole axis, bilinearly, [N, O, O].

    As torchvision's resized_crop: pixel centres at halves, edges repeated. The stretch is at most
    the axis, so there is nothing to smooth beforehand.

    Args:
        start_N: First px of the stretch.
        length_N: Px of the stretch.
        flipped_N: Whether the result runs backwards.
        out_px: Px of the axis.
    """
    place_O = torch.arange(out_px, device=start_N.device, dtype=torch.float32)
    place_NO = torch.where(flipped_N[:, None], out_px - 1 - place_O, place_O)
    start_N1, length_N1 = start_N[:, None].float(), length_N[:, None].float()
    source_NO = ((place_NO + 0.5) * (length_N1 / out_px) - 0.5).clamp_min_(0)
    source_NO = torch.minimum(source_NO, length_N1 - 1) + start_N1
    return (source_NO[:, :, None] - place_O).abs_().neg_().add_(1).clamp_min_(0)


def blur_matrix(sigma_N: Tensor, out_px: int) -> Tensor:
    """Return PIL's Gaussian blur along one axis, edges repeated, [N, O, O].

    PIL blurs three times with a box of fractional width (Gwosdek et al. 2011, equations 7 and 11),
    so the kernel is a piecewise polynomial and not quite a Gaussian.

    Args:
        sigma_N: Standard deviations in px, above 0 and up to a quarter of the axis.
        out_px: Px of the axis.
    """
    variance_N = sigma_N.double() ** 2 / 3
    whole_N = (((12 * variance_N + 1).sqrt() - 1) / 2).floor()
    share_N = (2 * whole_N + 1) * (whole_N * (whole_N + 1) - 3 * variance_N)
    share_N = share_N / (6 * (variance_N - (whole_N + 1) ** 2))
    radius_N11 = (whole_N + share_N).float()[:, None, None]
    place_O = torch.arange(out_px, device=sigma_N.device)
    distance_OO = (place_O[:, None] - place_O).abs()
    box_NOO = (radius_N11 + 1 - distance_OO).clamp_(0, 1) / (2 * radius_N11 + 1)
    beyond_NO = 1 - box_NOO.sum(
        2
    )  # weight outside the axis, which the pixel at that end stands for
    half = out_px // 2
    box_NOO[:, :half, 0] += beyond_NO[:, :half]
    box_NOO[:, half:, -1] += beyond_NO[:, half:]
    return box_NOO @ box_NOO @ box_NOO


def mean_index(side_px: int) -> Tensor:
    """Return a fifth of a crop's pixels, by knight's moves: no row or column is favoured.

    Returns:
        row * side_px + column, int32, on the CPU.
    """
    index = torch.arange(side_px**2, dtype=torch.int32)
    return index[(index % side_px + 2 * (index // side_px)) % 5 == 2]


def erase(views_CNHW: Tensor, boxes_N4: Tensor) -> None:
    """Set each view's rectangle to 0, in place.

    Args:
        views_CNHW: Square views.
        boxes_N4: Top, left, height and width; a height of 0 for none; on the CPU.
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
