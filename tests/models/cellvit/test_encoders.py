"""The encoders against those of timm, and their parts against loops."""

from functools import partial

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from scellst_ray.models.cellvit.encoders import (
    SamEncoder,
    VitEncoder,
    from_windows,
    relative_positions,
    to_windows,
)

DIM, HEADS, DEPTH = 32, 2, 4
NORM = partial(nn.LayerNorm, eps=1e-6)


def randomised(encoder, seed=0):
    """Return an encoder with random parameters, so that each affects the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            spread = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return encoder.eval().requires_grad_(requires_grad=False)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_plain_vit_is_timms():
    ours = randomised(VitEncoder(DIM, HEADS, DEPTH, (1, 2, 3, 4), num_classes=5))
    theirs = VisionTransformer(
        img_size=224,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=5,
        norm_layer=NORM,
        global_pool="token",
    )
    theirs.load_state_dict(ours.state_dict())
    x = noise(2, 3, 224, 224)
    with torch.inference_mode():
        logits, skips = ours(x)
        expected = theirs.eval().forward_intermediates(x, norm=False, intermediates_only=True)
        torch.testing.assert_close(logits, theirs(x), atol=1e-5, rtol=0)
    assert len(skips) == len(expected) == DEPTH
    for skip, grid in zip(skips, expected, strict=True):
        torch.testing.assert_close(skip, grid, atol=1e-5, rtol=0)


def bicubic(line, place):
    """Return the value of a line between its pixel centres (Keys 1981, a = -0.75)."""
    first = int(np.floor(place))
    total = 0.0
    for near in range(first - 1, first + 3):
        t = abs(place - near)
        if t <= 1:
            weight = 1.25 * t**3 - 2.25 * t**2 + 1
        else:
            weight = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
        total += weight * line[min(max(near, 0), len(line) - 1)]
    return total


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (5, 21)])
def test_positions_are_interpolated_at_a_size_a_tenth_too_large(rows, columns):
    encoder = randomised(VitEncoder(3, 1, 1, (1,), num_classes=0))
    found = encoder.positions(rows, columns)
    assert found.shape == (1, 1 + rows * columns, 3)
    assert torch.equal(found[:, 0], encoder.pos_embed[:, 0])
    grid = encoder.pos_embed[0, 1:].reshape(14, 14, 3).double().numpy()
    found = found[0, 1:].reshape(rows, columns, 3)
    for row, column in [(0, 0), (2, 3), (rows - 1, columns - 1), (rows // 2, columns // 2)]:
        down = (row + 0.5) * 14 / (rows + 0.1) - 0.5
        across = (column + 0.5) * 14 / (columns + 0.1) - 0.5
        expected = bicubic([bicubic(line, across) for line in grid], down)
        np.testing.assert_allclose(found[row, column], expected, atol=1e-5)


def test_positions_of_the_trained_size_are_left_alone():
    encoder = VitEncoder(3, 1, 1, (1,), num_classes=0)
    assert encoder.positions(14, 14) is encoder.pos_embed


def timm_sam(ours):
    """Return timm's SAM encoder with the weights of ours."""
    theirs = VisionTransformerSAM(
        img_size=1024,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=0,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(1, 3),
        norm_layer=NORM,
    )
    state = ours.state_dict()
    names = {"mlp.lin1": "mlp.fc1", "mlp.lin2": "mlp.fc2"}
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    theirs.load_state_dict(state)
    return theirs.eval()


# 1024 px (64 tokens) is the trained size. 37 x 20 tokens fill no whole number of windows, take the
# first positions of the grid, and need relative positions of another length.
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (37, 20)])
def test_the_sam_encoder_is_timms(rows, columns):
    ours = randomised(SamEncoder(DIM, HEADS, DEPTH, (1, 2, 3, 4), global_blocks=(1, 3)))
    theirs = timm_sam(ours)
    theirs.pos_embed = nn.Parameter(ours.pos_embed[:, :rows, :columns])
    x = noise(1, 3, 16 * rows, 16 * columns)
    with torch.inference_mode():
        summary, skips = ours(x)
        neck, expected = theirs.forward_intermediates(x)
    torch.testing.assert_close(summary, neck.mean(dim=(2, 3)), atol=1e-5, rtol=0)
    assert len(skips) == len(expected) == DEPTH
    for skip, grid in zip(skips, expected, strict=True):
        torch.testing.assert_close(skip, grid, atol=1e-5, rtol=0)


def test_relative_positions_are_looked_up_by_offset():
    table = torch.arange(27.0)[:, None]
    found = relative_positions(table, 14)[..., 0]
    for query in range(14):
        for key in range(14):
            assert found[query, key] == query - key + 13


@pytest.mark.parametrize(("rows", "columns"), [(14, 28), (1, 15), (30, 13)])
def test_windows_are_cut_padded_and_put_back(rows, columns):
    x = noise(2, rows, columns, 3)
    windows = to_windows(x)
    down, across = -(-rows // 14), -(-columns // 14)
    assert windows.shape == (2 * down * across, 14, 14, 3)
    assert torch.equal(from_windows(windows, 2, rows, columns), x)
    assert torch.equal(windows[0, : min(rows, 14), : min(columns, 14)], x[0, :14, :14])
    assert windows.abs().sum() == pytest.approx(x.abs().sum().item(), rel=1e-5)
