"""The network against reference outputs of the published network, and against slow twins."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from scellst_ray.models.cellvit.network import ARCHS, CellViT, arch_of
from tests.support.cellvit_weights import make_shapes, make_state
from tests.support.paths import SHARED

ORACLE = SHARED / "oracle" / "cellvit"


@pytest.fixture(scope="module")
def oracle():
    """Return the folder of reference outputs; skip the test if it does not exist."""
    if not ORACLE.is_dir():
        pytest.skip(f"reference outputs not found at {ORACLE}")
    return ORACLE


@pytest.fixture(scope="module")
def network():
    """Return CellViT-256 with the weights of the reference outputs."""
    with torch.device("meta"):
        network = CellViT(arch_of("256"), 6, 19)
    network.load_state_dict(make_state(), assign=True)
    return network.eval().requires_grad_(requires_grad=False)


def normalised(image_HWC):
    x = torch.from_numpy(image_HWC)[None].permute(0, 3, 1, 2).float() / 255
    return (x - 0.5) / 0.5


def images():
    """Return the two images of the reference outputs."""
    generator = np.random.default_rng(256)
    sizes = [(256, 256, 3), (1024, 1024, 3)]
    return [generator.integers(0, 256, size, dtype=np.uint8) for size in sizes]


@pytest.mark.parametrize(
    ("variant", "name"), [("256", "256"), ("SAM-B", "samb"), ("SAM-H", "samh")]
)
def test_the_state_dict_is_the_published_one(oracle, variant, name):
    expected = json.loads((oracle / f"cellvit{name}_state_dict.json").read_text(encoding="utf-8"))
    assert {key: list(shape) for key, shape in make_shapes(variant).items()} == expected


@pytest.mark.parametrize(
    ("variant", "num_keys", "millions"),
    [("256", 439, 46.75), ("SAM-B", 466, 146.09), ("SAM-L", 634, 367.85), ("SAM-H", 746, 699.74)],
)
def test_variants_have_the_published_sizes(variant, num_keys, millions):
    shapes = make_shapes(variant)
    assert len(shapes) == num_keys
    counted = [
        np.prod(v) for k, v in shapes.items() if not k.endswith(("_mean", "_var", "tracked"))
    ]
    assert sum(counted) / 1e6 == pytest.approx(millions, abs=0.005)


def test_a_tile_of_256_px_gives_the_published_maps(oracle, network):
    expected = np.load(oracle / "forward_256.npz")
    np.testing.assert_array_equal(expected["image"], images()[0])
    with torch.inference_mode():
        maps = network(normalised(expected["image"]), want_tokens=True)
    assert maps.regression_map is None
    for name in ("tissue_types", "nuclei_binary_map", "hv_map", "nuclei_type_map", "tokens"):
        np.testing.assert_allclose(getattr(maps, name), expected[name], atol=1e-4, rtol=0)


def test_a_tile_of_1024_px_gives_the_published_maps(oracle, network):
    expected = np.load(oracle / "forward_1024_every8th.npz")
    with torch.inference_mode():
        maps = network(normalised(images()[1]))
    np.testing.assert_allclose(maps.tissue_types, expected["tissue_types"], atol=1e-4, rtol=0)
    for name in ("nuclei_binary_map", "hv_map", "nuclei_type_map"):
        every8th = getattr(maps, name)[..., ::8, ::8]
        np.testing.assert_allclose(every8th, expected[name], atol=1e-4, rtol=0)


def spelled_out(network, branch, x, grids):
    """Return one branch's map; skips are computed for this branch alone, block by block."""

    def convolved(conv, norm, y):
        y = nn.functional.conv2d(y, conv.weight, conv.bias, padding=1)
        y = (y - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
        return (y * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)

    def twice(up, y):
        out = torch.zeros(len(y), up.weight.shape[1], 2 * y.shape[2], 2 * y.shape[3])
        for row in range(2):
            for column in range(2):
                value = torch.einsum("bcij,cd->bdij", y, up.weight[:, :, row, column])
                out[:, :, row::2, column::2] = value
        return out + up.bias[:, None, None]

    def run(blocks, y):
        for module in blocks:
            if isinstance(module, nn.ConvTranspose2d):
                y = twice(module, y)
            elif isinstance(module, nn.Conv2d):
                y = nn.functional.conv2d(y, module.weight, module.bias)
            else:
                layers = list(module.block)
                y = twice(layers.pop(0), y) if isinstance(layers[0], nn.ConvTranspose2d) else y
                y = convolved(layers[0], layers[1], y)
        return y

    y = twice(branch.bottleneck_upsampler, grids[3])
    y = run(branch.decoder3_upsampler, torch.cat([run(network.decoder3, grids[2]), y], 1))
    y = run(branch.decoder2_upsampler, torch.cat([run(network.decoder2, grids[1]), y], 1))
    y = run(branch.decoder1_upsampler, torch.cat([run(network.decoder1, grids[0]), y], 1))
    return run(branch.decoder0_header, torch.cat([run(network.decoder0, x), y], 1))


def test_shared_skips_give_what_separate_ones_give(network):
    x = normalised(images()[0][:48, :64])
    with torch.inference_mode():
        _, grids = network.encoder(x)
        maps = network(x)
        branches = {
            "nuclei_binary_map": network.nuclei_binary_map_decoder,
            "hv_map": network.hv_map_decoder,
            "nuclei_type_map": network.nuclei_type_maps_decoder,
        }
        for name, branch in branches.items():
            expected = spelled_out(network, branch, x, grids)
            torch.testing.assert_close(getattr(maps, name), expected, atol=1e-5, rtol=1e-5)


def test_a_sam_network_runs():
    torch.manual_seed(0)
    network = CellViT(arch_of("SAM-B"), 4, 3).eval()
    with torch.inference_mode():
        maps = network(torch.randn(1, 3, 64, 96), want_tokens=True)
    shapes = [tuple(part.shape) for part in maps if part is not None]
    maps_2, types = (1, 2, 64, 96), (1, 4, 64, 96)
    assert shapes == [(1, 3), maps_2, maps_2, types, (1, 768, 4, 6)]
    assert all(part.isfinite().all() for part in maps if part is not None)


def test_a_regression_map_is_the_rest_of_the_binary_branch():
    torch.manual_seed(0)
    network = CellViT(arch_of("256"), 3, 0, regression_loss=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        maps = network(x)
        both = network.decode(x, network.encoder(x)[1])[0]
    assert torch.equal(torch.cat([maps.nuclei_binary_map, maps.regression_map], dim=1), both)
    assert maps.regression_map.shape == (2, 2, 32, 32)
    assert maps.tokens is None
    assert maps.tissue_types.shape == (2, 384)  # without a tissue head its input is returned


@pytest.mark.parametrize("size", [(250, 256), (256, 24), (0, 16)])
def test_a_side_that_is_no_multiple_of_16_is_refused(size):
    with torch.device("meta"):
        network = CellViT(arch_of("256"), 6, 19)
        with pytest.raises(ValueError, match=r"sides that are multiples of 16; pad the image"):
            network(torch.zeros(1, 3, *size))


def test_an_image_larger_than_sams_positions_is_refused():
    with torch.device("meta"):
        network = CellViT(arch_of("SAM-B"), 6, 19)
        with pytest.raises(ValueError, match=r"1040 x 1024 px: CellViT-SAM-B .* at most 1024 px"):
            network(torch.zeros(1, 3, 1024, 1040))


def test_an_unknown_variant_names_those_there_are():
    with pytest.raises(ValueError, match=r"'SAM-X' is unknown; expected one of 256, SAM-B, SAM-L"):
        arch_of("SAM-X")
    assert [arch.max_px for arch in ARCHS.values()] == [None, 1024, 1024, 1024]
