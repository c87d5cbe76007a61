"""Packing against OpenCV, batches against single tiles, tokens against a loop."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn

from scellst_ray.models.cellvit import inference
from scellst_ray.models.cellvit.checkpoint import CellVit
from scellst_ray.models.cellvit.inference import (
    edge_energy,
    pack_maps,
    segment_tiles,
    tile_bytes,
    tokens_of,
)
from scellst_ray.models.cellvit.network import CellViT, Maps, arch_of
from scellst_ray.nuclei import hv_maps
from tests.support.cellvit_weights import PANNUKE, make_state
from tests.support.paths import SHARED

ORACLE = SHARED / "oracle" / "cellvit"
LEVEL = 2**24


def smooth(shape, seed, sigma=6):
    """Return noise whose slopes are about as wide as nuclei, float32."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (5 * ndimage.gaussian_filter(noise, (0,) * (len(shape) - 2) + (sigma,) * 2)).astype("f4")


def packed(binary, hv, types, window_px=None):
    """Return the packed maps of one tile's arrays, uint32 [H, W]."""
    batch = [torch.from_numpy(part)[None] for part in (binary, hv, types)]
    return pack_maps(*batch, window_px)[0].numpy().view(np.uint32)


def cv2_energy(hv):
    """Return the published edge energy as OpenCV computes it."""

    def scaled(x):
        return cv2.normalize(x, None, 0, 1, norm_type=cv2.NORM_MINMAX, dtype=cv2.CV_32F)

    across = cv2.Sobel(scaled(hv[0]), cv2.CV_64F, 1, 0, ksize=21)
    down = cv2.Sobel(scaled(hv[1]), cv2.CV_64F, 0, 1, ksize=21)
    return np.maximum(1 - scaled(across), 1 - scaled(down))


def cv2_packed(binary, hv, types):
    energy = cv2_energy(hv)
    assert energy.dtype == np.float32
    level = np.rint(np.clip((1 - energy.astype(np.float64)) * LEVEL, 0, LEVEL)).astype(np.uint64)
    classes = level + 2**25 * binary.argmax(0).astype(np.uint64)
    return (classes + 2**26 * types.argmax(0).astype(np.uint64)).astype(np.uint32)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (144, 336), (16, 48)])
def test_packing_is_opencvs_arithmetic(height, width):
    binary, hv = smooth((2, height, width), 0), smooth((2, height, width), 1)
    types = smooth((6, height, width), 2)
    np.testing.assert_array_equal(packed(binary, hv, types), cv2_packed(binary, hv, types))


@pytest.mark.parametrize("count", [30, 110])
def test_the_reference_maps_are_packed_as_opencv_would(count):
    if not ORACLE.is_dir():
        pytest.skip(f"reference outputs not found at {ORACLE}")
    maps = np.load(ORACLE / f"postprocess_{count}.npz")
    names = ("nuclei_binary_map", "hv_map", "nuclei_type_map")
    arrays = [maps[name].astype(np.float32).reshape(-1, 512, 512) for name in names]
    np.testing.assert_array_equal(packed(*arrays), cv2_packed(*arrays))


def test_a_batch_is_packed_tile_by_tile_on_any_number_of_types():
    tiles = [[smooth((c, 64, 80), 3 * seed + c) for c in (2, 2, 64)] for seed in range(3)]
    batch = [torch.from_numpy(np.stack(parts)) for parts in zip(*tiles, strict=True)]
    found = pack_maps(*batch)
    assert found.dtype == torch.int32
    for tile, number in zip(tiles, found.numpy().view(np.uint32), strict=True):
        np.testing.assert_array_equal(number, cv2_packed(*tile))
    assert (found.numpy().view(np.uint32) >> 26).max() == 63


def test_flat_maps_are_all_edge():
    zeros = np.zeros((2, 32, 32), np.float32)
    assert (packed(zeros, zeros, np.zeros((6, 32, 32), np.float32)) == 0).all()
    assert (packed(-zeros + [[[0]], [[1]]], zeros + 3, zeros) == 2**25).all()


def test_probabilities_that_round_to_a_tie_take_the_first_class():
    binary = torch.zeros(1, 2, 32, 32)
    binary[:, 1] = 1e-9  # this logit is greater, but the softmax of both is 0.5
    found = pack_maps(binary, torch.zeros(1, 2, 32, 32), torch.zeros(1, 3, 32, 32))
    assert (found == 0).all()


@pytest.mark.parametrize("window_px", [3, 32, 33, 64])
def test_a_window_scales_by_its_own_extremes(window_px):
    hv = smooth((2, 96, 144), 7)
    side = 2 * (window_px // 2) + 1
    energies = []
    for offset, (dx, dy) in zip(hv, [(1, 0), (0, 1)], strict=True):
        gradient = cv2.Sobel(offset, cv2.CV_64F, dx, dy, ksize=21)
        high = ndimage.maximum_filter(gradient, side, mode="constant", cval=-np.inf)
        low = ndimage.minimum_filter(gradient, side, mode="constant", cval=np.inf)
        energies.append(1 - (gradient - low) / (high - low))
    found = edge_energy(torch.from_numpy(hv)[None], window_px)[0]
    # float32 loses more digits where the extremes of a small window are close to each other.
    np.testing.assert_allclose(found, np.maximum(*energies), atol=1e-5 if window_px == 3 else 1e-6)


@pytest.mark.parametrize("window_px", [None, 3, 40])
def test_packing_on_the_device_and_after_it_agree(window_px):
    arrays = [smooth((channels, 80, 112), channels, sigma=4) for channels in (2, 3, 5)]
    arrays[1] = arrays[1][:2]
    expected = hv_maps.pack_maps(*arrays, window_px)
    np.testing.assert_array_equal(packed(*arrays, window_px), expected)


def test_a_window_over_the_whole_tile_changes_nothing():
    hv = torch.from_numpy(smooth((1, 2, 64, 64), 8))
    torch.testing.assert_close(edge_energy(hv, 128), edge_energy(hv), atol=1e-6, rtol=0)


def test_a_window_makes_a_pixel_independent_of_what_is_far():
    near, far = smooth((1, 2, 64, 256), 9), smooth((1, 2, 64, 256), 10) * 20
    far[..., :160] = near[..., :160]
    reach = 160 - 16 - 10  # half a window and half a Sobel kernel
    both = [edge_energy(torch.from_numpy(hv), 32)[..., :reach] for hv in (near, far)]
    assert torch.equal(*both)
    whole = [edge_energy(torch.from_numpy(hv))[..., :reach] for hv in (near, far)]
    assert (whole[0] - whole[1]).abs().max() > 0.1


class Stub(nn.Module):
    """A network whose maps are the pixels. It records its batches, and `room` limits their size."""

    def __init__(self, room=99):
        super().__init__()
        self.room, self.batches, self.scale = room, [], 1.0

    def forward(self, x, *, want_tokens=False):
        self.batches.append(x.clone())
        if len(x) > self.room:
            message = "stub"
            raise torch.OutOfMemoryError(message)
        x = x * self.scale
        tokens = nn.functional.avg_pool2d(x, 16) if want_tokens else None
        return Maps(x.mean((2, 3)), x[:, :2], x[:, 1:], x, tokens, None)


def stub_model(room=99):
    mean, std = (0.5, 0.25, 0.125), (0.5, 1.0, 2.0)
    return CellVit(
        network=Stub(room),
        arch=arch_of("256"),
        type_names=PANNUKE,
        mean=mean,
        std=std,
        mixed_precision=True,
        digest="sha256:0",
    )


def tiles(*sizes, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def test_pixels_are_normalised_and_padded_with_white():
    model = stub_model()
    (image,) = tiles((20, 32))
    ((number, tokens),) = segment_tiles(model, [image], 32, "cpu", "float32")
    assert (number.shape, number.dtype, tokens) == ((32, 32), np.uint32, None)
    white = np.full((32, 32, 3), 255, np.uint8)
    white[:20] = image
    expected = (white / 255 - model.mean) / model.std
    (found,) = model.network.batches
    np.testing.assert_allclose(found[0].permute(1, 2, 0), expected, atol=1e-6)


def test_results_keep_the_order_of_the_images():
    model = stub_model()
    images = tiles((32, 32), (32, 16), (8, 32), (32, 32), (32, 32))
    together = segment_tiles(model, images, 32, "cpu", "float32", tokens=True, batch_size=2)
    assert [len(batch) for batch in model.network.batches] == [2, 2, 1]
    for image, (number, tokens) in zip(images, together, strict=True):
        ((alone, alone_tokens),) = segment_tiles(model, [image], 32, "cpu", "float32", tokens=True)
        np.testing.assert_array_equal(number, alone)
        np.testing.assert_array_equal(tokens, alone_tokens)
        assert (tokens.shape, tokens.dtype) == ((2, 2, 3), np.float16)
    assert segment_tiles(model, [], 32, "cpu", "float32") == []


def test_a_cpu_takes_one_tile_at_a_time():
    model = stub_model()
    segment_tiles(model, tiles((32, 32), (32, 32)), 32, "cpu", "float32")
    assert [len(batch) for batch in model.network.batches] == [1, 1]


@pytest.mark.parametrize(
    ("room", "sizes"), [(8, [5]), (3, [5, 2, 2, 1]), (1, [5, 2, 1, 1, 1, 1, 1])]
)
def test_a_batch_is_halved_until_it_fits(room, sizes):
    images = tiles(*[(16, 16)] * 5)
    model = stub_model(room)
    found = segment_tiles(model, images, 16, "cpu", "float32", batch_size=5)
    assert [len(batch) for batch in model.network.batches] == sizes
    whole = segment_tiles(stub_model(), images, 16, "cpu", "float32", batch_size=5)
    for (number, _), (expected, _) in zip(found, whole, strict=True):
        np.testing.assert_array_equal(number, expected)


def test_a_tile_that_does_not_fit_alone_says_what_to_do():
    with pytest.raises(
        ValueError, match=r"cpu: one tile of 16 px does not fit.*256 in float32; use"
    ):
        segment_tiles(stub_model(0), tiles((16, 16)), 16, "cpu", "float32")


def test_the_batch_is_what_free_memory_allows(monkeypatch):
    one = tile_bytes(1024, "float16")
    assert 0.5e9 < one < 2e9
    assert tile_bytes(1024, "float32") == pytest.approx(2 * one)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * one, 100 * one))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 7 * one)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * one)
    size = inference._batch_size
    assert size(1024, "cuda", "float16", 99) == 8  # 0.8 of 5 free and 5 reserved, not allocated
    assert size(1024, "cuda", "float16", 3) == 3
    assert size(1024, "cuda", "float32", 99) == 4
    assert size(8192, "cuda", "float32", 99) == 1
    assert size(1024, "cpu", "float32", 99) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_maps_that_are_not_finite_are_refused(value):
    model = stub_model()
    model.network.scale = value
    with pytest.raises(ValueError, match=r"not finite in float32; use float32 or bfloat16"):
        segment_tiles(model, tiles((16, 16)), 16, "cpu", "float32", tokens=True)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((33, 32, 3), np.uint8),
        np.zeros((32, 32, 4), np.uint8),
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 32, 3), np.float32),
    ],
)
def test_an_image_that_does_not_fit_is_refused(image):
    with pytest.raises(ValueError, match=r"expected uint8 RGB of at most 32 x 32 px"):
        segment_tiles(stub_model(), [image], 32, "cpu", "float32")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision 'int8': expected one of float32, bfloat16"):
        segment_tiles(stub_model(), [], 32, "cpu", "int8")


@pytest.fixture(scope="module")
def model():
    """Return CellViT-256 with deterministic weights."""
    with torch.device("meta"):
        network = CellViT(arch_of("256"), 6, 19)
    network.load_state_dict(make_state(), assign=True)
    network.eval().requires_grad_(requires_grad=False)
    return dataclasses.replace(stub_model(), network=network, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_the_networks_maps_are_what_is_packed(model):
    images = tiles((64, 64), (64, 64), seed=1)
    found = segment_tiles(model, images, 64, "cpu", "float32", tokens=True)
    for image, (number, tokens) in zip(images, found, strict=True):
        x = torch.from_numpy(image)[None].permute(0, 3, 1, 2) / 255
        with torch.inference_mode():
            maps = model.network((x - 0.5) / 0.5, want_tokens=True)
        parts = (maps.nuclei_binary_map, maps.hv_map, maps.nuclei_type_map)
        expected = cv2_packed(*(part[0].numpy() for part in parts))
        assert (number >> 25 == expected >> 25).mean() > 0.999
        levels = [(n & (2**25 - 1)).astype(float) / LEVEL for n in (number, expected)]
        np.testing.assert_allclose(*levels, atol=1e-4)  # memory layouts change rounding
        np.testing.assert_allclose(tokens, maps.tokens[0].permute(1, 2, 0), rtol=2e-3, atol=1e-3)


def test_half_precision_stays_close(model):
    images = tiles((48, 48), seed=2)
    ((exact, whole),) = segment_tiles(model, images, 48, "cpu", "float32", tokens=True)
    ((rough, half),) = segment_tiles(model, images, 48, "cpu", "bfloat16", tokens=True)
    assert (exact != rough).any()
    assert (exact >> 25 == rough >> 25).mean() > 0.95
    np.testing.assert_allclose(half, whole, atol=0.05 * np.abs(whole).max())


def token_grid(rows, columns, dim, seed):
    return np.random.default_rng(seed).standard_normal((rows, columns, dim)).astype(np.float16)


@settings(deadline=None)
@given(st.data())
def test_tokens_are_averaged_under_each_box(data):
    rows, columns = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    grid = token_grid(rows, columns, 5, rows * columns)
    sides = [st.integers(0, 16 * size) for size in (columns, rows)]
    boxes = []
    for _ in range(data.draw(st.integers(0, 4))):
        x0, x1 = sorted(data.draw(st.lists(sides[0], min_size=2, max_size=2, unique=True)))
        y0, y1 = sorted(data.draw(st.lists(sides[1], min_size=2, max_size=2, unique=True)))
        boxes.append((x0, y0, x1, y1))
    found = tokens_of(grid, np.array(boxes, np.int32).reshape(-1, 4))
    assert (found.shape, found.dtype) == ((len(boxes), 5), np.float16)
    for (x0, y0, x1, y1), mean in zip(boxes, found, strict=True):
        down = slice(int(np.floor(y0 / 16)), int(np.ceil(y1 / 16)))
        across = slice(int(np.floor(x0 / 16)), int(np.ceil(x1 / 16)))
        expected = grid[down, across].astype(np.float64).mean((0, 1))
        np.testing.assert_allclose(mean, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 4), (4, 8, 8, 8), (-1, 0, 4, 4), (0, 0, 33, 4), (0, 0, 4, 17), (8, 0, 4, 4)]
)
def test_a_box_without_tokens_is_refused(box):
    good = (0, 0, 32, 16)
    with pytest.raises(ValueError, match=r"not empty and lies in a tile of 32 x 16 px"):
        tokens_of(token_grid(1, 2, 3, 0), np.array([good, box]))
