"""Views against the published pipeline, their distributions, seeds and devices."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms
from torchvision.transforms import functional as tv

from scellst_ray.models.moco import augment as augment_module
from scellst_ray.models.moco.augment import AugmentConfig, apply, augment, draw
from tests.support.moco_crops import jitter_tv, seeded, tissue

MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.15)
STILL = {"jitter_prob": 0.0, "degrees": 0.0, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
STILL |= {"blur_prob": 0.0, "erase_prob": 0.0}
EVERYTHING = AugmentConfig(flips=True, stain_jitter=0.1)
NUM = 4000


@pytest.fixture(scope="module")
def crops():
    return tissue(24)


@pytest.fixture(scope="module")
def many():
    return draw(NUM, AugmentConfig(), seeded(0))


def in_unit(views):
    """Undo the normalisation."""
    return views * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


def view_pil(crop, parameters):
    """Make one view as published: PIL images and torchvision's functions, one crop."""
    image = Image.fromarray(crop.numpy())
    image = jitter_tv(image, parameters.jitter_order[0], parameters.jitter_factors[0])
    image = tv.center_crop(tv.rotate(image, float(parameters.angle_deg[0])), 48)
    image = tv.resized_crop(image, *parameters.crop_px[0].tolist(), [48, 48])
    if parameters.blur_px[0]:
        image = image.filter(ImageFilter.GaussianBlur(float(parameters.blur_px[0])))
    return tv.erase(tv.to_tensor(image), *parameters.erase_px[0].tolist(), torch.tensor(0.0))


# The whole list against the published pipeline


def test_views_equal_the_published_pipeline_but_for_rounding(crops):
    parameters = draw(len(crops), AugmentConfig(), seeded(3))
    views = in_unit(apply(crops, parameters, AugmentConfig(), MEAN, STD))
    off = []
    for row, crop in enumerate(crops):
        off.append((views[row] - view_pil(crop, parameters[row : row + 1])).abs())
    off = torch.stack(off) * 255
    # PIL's hue has 8 bits. In pale colours one step of it is several levels of RGB.
    assert off.mean() < 1.5
    assert off.flatten(1).mean(1).max() < 3
    unrelated = draw(len(crops), AugmentConfig(), seeded(4))
    other = in_unit(apply(crops, unrelated, AugmentConfig(), MEAN, STD))
    assert (views - other).abs().mean() * 255 > 20


def test_without_colour_nothing_is_off_by_more_than_roundings(crops):
    config = AugmentConfig(jitter_prob=0, blur_prob=0.5, erase_prob=0.5)
    parameters = draw(len(crops), config, seeded(5))
    views = in_unit(apply(crops, parameters, config, MEAN, STD))
    pil = torch.stack([view_pil(c, parameters[i : i + 1]) for i, c in enumerate(crops)])
    off = (views - pil).abs() * 255
    # A source within 1e-4 px of the border of two pixels may be either pixel.
    assert (off > 2.5).float().mean() < 1e-3
    assert off.mean() < 0.5


@pytest.mark.parametrize("side", [68, 69, 72, 80])
def test_no_corner_of_a_rotated_view_lies_outside_the_crop(side):
    config = AugmentConfig(**(STILL | {"degrees": 360.0}))
    views = augment(torch.full((300, side, side, 3), 255, dtype=torch.uint8), config, (0, 0, 0),
                    (1, 1, 1), seeded(0))  # fmt: skip
    torch.testing.assert_close(views, torch.ones_like(views))
    angles = torch.linspace(0, 90, 91)
    centre = torch.arange(48) + 0.5 - 24
    reach = centre[-1] * (angles.deg2rad().cos() + angles.deg2rad().sin()).max() + 0.5
    assert reach <= side / 2


def test_erased_pixels_are_black_before_normalisation(crops):
    config = AugmentConfig(**(STILL | {"erase_prob": 1.0}))
    parameters = draw(len(crops), config, seeded(0))
    views = apply(crops, parameters, config, MEAN, STD)
    kept = draw(len(crops), AugmentConfig(**STILL), seeded(0))
    untouched = apply(crops, kept, AugmentConfig(**STILL), MEAN, STD)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    for row, (top, left, height, width) in enumerate(parameters.erase_px.tolist()):
        assert height * width > 0
        expected = untouched[row].clone()
        expected[:, top : top + height, left : left + width] = black[:, None, None]
        torch.testing.assert_close(views[row], expected, atol=1e-6, rtol=0)


def test_still_views_are_the_normalised_centre_and_flips_mirror_it(crops):
    centre = crops[:, 12:60, 12:60].permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]
    centre = centre / torch.tensor(STD)[:, None, None]
    still = augment(crops, AugmentConfig(**STILL), MEAN, STD, seeded(0))
    torch.testing.assert_close(still, centre, atol=2e-6, rtol=2e-6)
    config = AugmentConfig(**STILL, flips=True)
    parameters = draw(len(crops), config, seeded(0))
    views = apply(crops, parameters, config, MEAN, STD)
    assert 0 < parameters.flipped.float().mean() < 1
    for view, plain, (down, across) in zip(views, centre, parameters.flipped, strict=True):
        axes = [axis for axis, on in ((1, down), (2, across)) if on]
        torch.testing.assert_close(view, plain.flip(axes), atol=2e-6, rtol=2e-6)


# Distributions of the parameters against torchvision's draws


def same(ours, theirs):
    """Return whether a two-sample Kolmogorov-Smirnov test finds no difference."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    return stats.ks_2samp(ours, theirs, method="asymp").pvalue > 1e-3


def test_jitter_is_drawn_as_torchvision_draws_it(many):
    torch.manual_seed(0)
    config = AugmentConfig()
    theirs = transforms.ColorJitter(
        config.brightness, config.contrast, config.saturation, config.hue
    )
    drawn = [
        theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue)[1:]
        for _ in range(NUM)
    ]
    for ours, other in zip(many.jitter_factors.T, zip(*drawn, strict=True), strict=True):
        assert same(ours, other)
    correlation = np.corrcoef(many.jitter_factors.T.double()) - np.eye(4)
    assert np.abs(correlation).max() < 0.06
    jittered = many.jitter_order[:, 0] >= 0
    assert stats.binomtest(int(jittered.sum()), NUM, 0.8).pvalue > 1e-3
    assert (many.jitter_order[~jittered] == -1).all()
    orders, counts = many.jitter_order[jittered].unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [((0.6, 1.0), (3 / 4, 4 / 3)), ((0.97, 1.0), (0.5, 2.0)), ((0.08, 0.3), (0.9, 1.6))],
)
def test_crops_are_drawn_as_torchvision_draws_them(scale, ratio):
    torch.manual_seed(0)
    image = torch.empty(3, 48, 48)
    theirs = [transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(NUM)]
    config = AugmentConfig(crop_scale=scale, crop_ratio=ratio)
    ours = draw(NUM, config, seeded(1)).crop_px
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= 48).all()
    for column, other in enumerate(zip(*theirs, strict=True)):
        assert same(ours[:, column], other)
    theirs = np.array(theirs)
    assert same(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert same(ours[:, 2].double() / ours[:, 3], theirs[:, 2] / theirs[:, 3])


@pytest.mark.parametrize("ratio", [(3.0, 4.0), (1 / 4, 1 / 3)])
def test_a_crop_that_never_fits_falls_back_as_torchvision_s(ratio):
    image = torch.empty(3, 48, 48)
    expected = transforms.RandomResizedCrop.get_params(image, (0.9, 1.0), ratio)
    config = AugmentConfig(crop_scale=(0.9, 1.0), crop_ratio=ratio)
    assert (draw(50, config, seeded(0)).crop_px == torch.tensor(expected)).all()


def test_erasures_are_drawn_as_torchvision_draws_them(many):
    torch.manual_seed(0)
    config, image = AugmentConfig(), torch.empty(3, 48, 48)
    scale, ratio = config.erase_scale, config.erase_ratio
    drawn = [
        transforms.RandomErasing.get_params(image, scale, ratio, [0.0])[:4] for _ in range(NUM)
    ]
    ours = many.erase_px[many.erase_px[:, 2] > 0]
    assert stats.binomtest(len(ours), NUM, config.erase_prob).pvalue > 1e-3
    for column, other in enumerate(zip(*drawn, strict=True)):
        assert same(ours[:, column], other)
    area = (ours[:, 2] * ours[:, 3]) / 48**2
    assert 0.04 < area.min() < 0.06
    assert 0.14 < area.max() < 0.16
    never = AugmentConfig(erase_prob=1.0, erase_scale=(0.999, 1.0), erase_ratio=(1.0, 1.0))
    assert (draw(50, never, seeded(0)).erase_px == 0).all()
    assert transforms.RandomErasing.get_params(image, (0.999, 1.0), (1.0, 1.0), [0.0])[2] == 48


def test_angle_blur_flips_and_stains_are_uniform(many):
    torch.manual_seed(0)
    assert same(
        many.angle_deg, [transforms.RandomRotation.get_params([-360, 360]) for _ in range(NUM)]
    )
    blurred = many.blur_px[many.blur_px > 0].numpy()
    assert stats.binomtest(len(blurred), NUM, 0.1).pvalue > 1e-3
    assert stats.kstest(blurred, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    assert not many.flipped.any()
    assert (many.stain_scale == 1).all()
    assert (many.stain_shift == 0).all()
    options = draw(NUM, EVERYTHING, seeded(0))
    assert (
        stats.chisquare((options.flipped[:, 0] + 2 * options.flipped[:, 1]).bincount()).pvalue
        > 1e-3
    )
    for column in range(2):
        for value, low in ((options.stain_scale, 0.9), (options.stain_shift, -0.1)):
            assert stats.kstest(value[:, column].numpy(), stats.uniform(low, 0.2).cdf).pvalue > 1e-3
    assert (options.angle_deg == many.angle_deg).all()  # an option changes nothing else
    assert (options.erase_px == many.erase_px).all()


# Batches, seeds, types, devices


def test_a_view_does_not_depend_on_how_the_batch_is_cut(crops, monkeypatch):
    parameters = draw(len(crops), EVERYTHING, seeded(0))
    whole = apply(crops, parameters, EVERYTHING, MEAN, STD)
    for cut in (1, 5, 11):
        rows = [slice(start, start + cut) for start in range(0, len(crops), cut)]
        parts = [apply(crops[row], parameters[row], EVERYTHING, MEAN, STD) for row in rows]
        torch.testing.assert_close(torch.cat(parts), whole, atol=2e-6, rtol=0)
    some = torch.tensor([20, 3, 3, 9])
    torch.testing.assert_close(
        apply(crops[some], parameters[some], EVERYTHING, MEAN, STD), whole[some], atol=2e-6, rtol=0
    )
    monkeypatch.setattr(augment_module, "CPU_CHUNK", 7)
    again = apply(crops, parameters, EVERYTHING, MEAN, STD)
    torch.testing.assert_close(again, whole, atol=2e-6, rtol=0)


def test_the_seed_and_nothing_else_decides(crops):
    torch.manual_seed(1)
    first = augment(crops, EVERYTHING, MEAN, STD, seeded(5))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in a training step
        second = augment(crops, EVERYTHING, MEAN, STD, seeded(5))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    generator = seeded(5)
    views = [augment(crops, EVERYTHING, MEAN, STD, generator) for _ in range(2)]
    assert torch.equal(views[0], first)
    assert (views[0] - views[1]).abs().flatten(1).mean(1).min() > 0.01


def test_views_are_float32_channels_last_and_leave_the_crops_alone(crops):
    before = crops.clone()
    views = augment(crops, EVERYTHING, MEAN, STD, seeded(0))
    assert views.shape == (len(crops), 3, 48, 48)
    assert views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(crops, before)
    flipped = crops.flip(0)[::2].transpose(1, 2)  # not contiguous
    plain = augment(flipped.contiguous(), EVERYTHING, MEAN, STD, seeded(1))
    assert torch.equal(augment(flipped, EVERYTHING, MEAN, STD, seeded(1)), plain)
    assert augment(crops[:0], EVERYTHING, MEAN, STD, seeded(0)).shape == (0, 3, 48, 48)
    small = augment(crops, AugmentConfig(out_px=33), MEAN, STD, seeded(0))
    assert small.shape == (len(crops), 3, 33, 33)


class OneDevice(TorchDispatchMode):
    """A mode that refuses operations on tensors of two devices, and copies to the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.ndim]
        devices = {tensor.device.type for tensor in tensors}
        if function is torch.ops.aten._to_copy.default:
            assert not (devices == {"meta"} and result.device.type == "cpu")
        else:
            assert len(devices) <= 1, f"{function} mixes {devices}"
        return result


def test_another_device_is_neither_mixed_with_the_cpu_nor_waited_for():
    parameters = draw(32, EVERYTHING, seeded(0))
    crops = torch.empty((32, 72, 72, 3), dtype=torch.uint8, device="meta")
    with OneDevice():
        views = augment_module._make_views(crops, parameters, EVERYTHING)
    assert views.device.type == "meta"
    assert views.shape == (3, 32, 48, 48)
    with pytest.raises(AssertionError, match="mixes"), OneDevice():
        torch.ones(2, device="meta").mul_(torch.ones(2))


# Refused arguments


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"jitter_prob": 1.1}, "jitter_prob: got 1.1, expected a number from 0 to 1"),
        ({"blur_prob": -0.1}, "blur_prob"),
        ({"erase_prob": float("nan")}, "erase_prob"),
        ({"hue": 0.6}, "hue: got 0.6, expected a number from 0 to 0.5"),
        ({"brightness": 1.5}, "brightness"),
        ({"stain_jitter": -1.0}, "stain_jitter"),
        ({"degrees": 400}, "degrees"),
        ({"crop_scale": (0.8, 0.6)}, "the lesser first"),
        ({"crop_scale": (0.6, 1.2)}, "up to 1"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio"),
        ({"blur_radius_px": (0.1, 13.0)}, "up to 12"),
        ({"erase_ratio": (1.0, float("inf"))}, "erase_ratio"),
        ({"out_px": 0}, "out_px"),
    ],
)
def test_a_config_out_of_range_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        AugmentConfig(**change)


def test_crops_and_parameters_that_do_not_fit_are_refused(crops):
    config = AugmentConfig()
    parameters = draw(len(crops), config, seeded(0))
    for wrong in (crops.float(), crops[..., :2], crops[:, :70], crops[0]):
        with pytest.raises(ValueError, match="expected uint8"):
            apply(wrong, parameters, config, MEAN, STD)
    with pytest.raises(ValueError, match="67 px wide; a rotated view of 48 px needs 68"):
        apply(crops[:, :67, :67], parameters, config, MEAN, STD)
    with pytest.raises(ValueError, match="24 crops and parameters of 23"):
        apply(crops, parameters[:23], config, MEAN, STD)
    for mean, std in ((MEAN, (0.2, 0.0, 0.2)), (MEAN[:2], STD), (MEAN, STD[:1])):
        with pytest.raises(ValueError, match="three numbers each"):
            apply(crops, parameters, config, mean, std)
    still = augment(crops[:, :48, :48], AugmentConfig(**STILL), MEAN, STD, seeded(0))
    assert still.shape[2:] == (48, 48)


def test_a_generator_of_another_device_is_refused():
    with pytest.raises(ValueError, match="draws on the CPU; got a generator on cuda"):
        draw(2, AugmentConfig(), SimpleNamespace(device=torch.device("cuda")))
