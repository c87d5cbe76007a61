"""Colour operations on whole batches of crops: one call, with a strength for each sample.

Pixels are float32 in 0-1, one plane per channel. They need not form an image, since no operation
depends on the place of a pixel.

Shape letters: C channels (RGB), N samples, P pixels of a sample, K samples with a hue.
"""

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# Weights of RGB in grey, ITU-R 601, as in PIL and torchvision.
GREY_WEIGHTS = (0.2989, 0.587, 0.114)
# RGB optical densities of hematoxylin, eosin and residual (Ruifrok and Johnston 2001).
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
DARKEST = 1 / 255


def grey(x_CNP: Tensor) -> Tensor:
    """Return the luminance, [N, P]; x must be contiguous."""
    weights_C = torch.tensor(GREY_WEIGHTS, device=x_CNP.device)
    return (weights_C @ x_CNP.view(3, -1)).view(x_CNP.shape[1:])


def shift_hue(x_CNP: Tensor, turns_N1: Tensor) -> None:
    """Turn the hue in place; saturation and value of HSV stay.

    RGB is converted to HSV and back in one pass without branches, which are slow on tensors. Let m
    be the least channel and c the chroma (greatest less least channel). The hue h runs over 0-6,
    with red at 0.

    - To HSV: h = 1 + (g + b - r - m) / c if g >= b, else 6 minus that, both modulo 6. In each
      sextant one channel is m and one is m + c, which gives the usual formula.
    - To RGB: each channel is m + c * clamp(x, 0, 1). Here x is |h - 3| - 1 for red, 2 - |h - 2|
      for green and 2 - |h - 4| for blue.

    Args:
        x_CNP: Pixels, 0-1.
        turns_N1: Turn of each sample, in whole turns.
    """
    red, green, blue = x_CNP
    least_NP = x_CNP.amin(0)
    chroma_NP = x_CNP.amax(0).sub_(least_NP)
    hue_NP = (green + blue).sub_(red).sub_(least_NP).div_(chroma_NP.clamp_min(1e-12)).add_(1)
    hue_NP = torch.add(turns_N1, hue_NP.copysign_(green - blue), alpha=1 / 6)
    hue_NP.sub_(hue_NP.floor())  # in turns
    table = torch.tensor([[3, 2, 4], [6, -6, -6], [-1, 2, 2]], device=x_CNP.device)
    peak, slope, offset = table[..., None, None]
    torch.sub(hue_NP, peak / 6, out=x_CNP).abs_().mul_(slope).add_(offset).clamp_(0, 1)
    x_CNP.mul_(chroma_NP).add_(least_NP)


def jitter(x_CNP: Tensor, order_N4: Tensor, factors_N4: Tensor, *, first: int = 0) -> None:
    """Apply torchvision's ColorJitter in place, every sample in its own order.

    Brightness, contrast and saturation by a factor f have one formula: clamp(f x + (1 - f) other).
    `other` is 0, the mean grey of the sample and the grey of the pixel, respectively. Therefore
    each place in the order is one pass over all samples. Samples with a hue or nothing at this
    place have f = 1.

    Args:
        x_CNP: Pixels, 0-1.
        order_N4: Operation (BRIGHTNESS and so on) of each sample at each place, -1 for none; on
            the CPU.
        factors_N4: Strengths by operation, on the CPU; 1 changes nothing. For hue: whole turns.
        first: Index of the first pixel that counts in the mean grey.
    """
    strength_N4 = factors_N4.gather(1, order_N4.clamp_min(0))
    own_N4 = torch.where((order_N4 >= 0) & (order_N4 != HUE), strength_N4, 1)
    mean_share_N4, grey_share_N4 = (
        (1 - own_N4) * (order_N4 == operation) for operation in (CONTRAST, SATURATION)
    )
    weights = torch.stack([own_N4, mean_share_N4, grey_share_N4]).to(x_CNP.device)
    places, samples = torch.nonzero(order_N4.T == HUE, as_tuple=True)
    counts = places.bincount(minlength=order_N4.shape[1]).tolist()
    samples_at = torch.split(samples.to(x_CNP.device), counts)
    turns_at = torch.split(factors_N4[samples, HUE, None].to(x_CNP.device), counts)
    for place in range(order_N4.shape[1]):
        own_N1, mean_share_N1, grey_share_N1 = weights[:, :, place, None]
        other_NP = grey(x_CNP)
        mean_N1 = other_NP[:, first:].mean(1, keepdim=True)
        other_NP.mul_(grey_share_N1).add_(mean_N1.mul_(mean_share_N1))
        torch.addcmul(other_NP, x_CNP, own_N1, out=x_CNP).clamp_(0, 1)
        samples_K, turns_K1 = samples_at[place], turns_at[place]
        if len(samples_K):
            part_CKP = x_CNP.index_select(1, samples_K)
            shift_hue(part_CKP, turns_K1)
            x_CNP.index_copy_(1, samples_K, part_CKP)


def jitter_stains(x_CNP: Tensor, scale_N2: Tensor, shift_N2: Tensor) -> None:
    """Scale and shift the concentrations of hematoxylin and eosin in place.

    The method is that of Tellez et al. 2018. Optical density is unmixed into stains. A
    concentration becomes scale * concentration + shift. The change absorbs light, and the pixel is
    multiplied by that absorption, so that nothing else changes.

    Args:
        x_CNP: Pixels, 0-1.
        scale_N2: Factors of hematoxylin and eosin; 1 changes nothing.
        shift_N2: Shifts of hematoxylin and eosin, in natural optical density along the unit stain
            vector; 0 changes nothing.
    """
    stains_SC = torch.tensor(STAINS, dtype=torch.float64)
    stains_SC /= stains_SC.norm(dim=1, keepdim=True)
    unmix_CS = torch.linalg.inv(stains_SC)
    density_CNP = x_CNP.clamp_min(DARKEST).log_().neg_()
    extra_CNP = torch.zeros_like(x_CNP)
    for stain in range(2):
        change_NP = torch.zeros_like(x_CNP[0])
        for channel in range(3):
            change_NP.add_(density_CNP[channel], alpha=float(unmix_CS[channel, stain]))
        change_NP.mul_(scale_N2[:, stain, None] - 1).add_(shift_N2[:, stain, None])
        for channel in range(3):
            extra_CNP[channel].add_(change_NP, alpha=float(stains_SC[stain, channel]))
    x_CNP.mul_(extra_CNP.neg_().exp_()).clamp_(0, 1)
