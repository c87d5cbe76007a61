import json

import cv2
import numpy as np
import pytest

from scellst_ray.core.schemas import MAP_LEVEL, MAP_NUCLEUS, MAP_TYPE_SHIFT
from scellst_ray.nuclei.hv_maps import label_packed, nuclei_from_packed, pack_maps
from scellst_ray.slides.synthetic.ideal_maps import ideal_maps
from tests.support import full_scan
from tests.support.contours import pixel_contours
from tests.support.paths import SHARED

ORACLE = SHARED / "oracle" / "cellvit"
NAMES = [f"type {k}" for k in range(6)]


def oracle(name):
    """Return raw maps, the published label map and the published cells."""
    path = ORACLE / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"needs the published outputs in {ORACLE}")
    stored = np.load(path)
    keys = ("nuclei_binary_map", "hv_map", "nuclei_type_map")
    maps = [stored[key][0].astype(np.float32) for key in keys]
    cells = json.loads((ORACLE / f"{name}_cells.json").read_text(encoding="utf-8"))
    return maps, stored["instances"], cells


def ellipses(num, side, rng):
    labels = np.zeros((side, side), np.int32)
    for label in range(1, num + 1):
        axes, centre = rng.uniform(12, 34, 2), rng.uniform(0, side, 2)
        cv2.ellipse(labels, (tuple(centre), tuple(axes), rng.uniform(0, 180)), label, -1)
    return labels


def network_maps(seed, num=60, side=256):
    rng = np.random.default_rng(seed)
    labels = ellipses(num, side, rng)
    return ideal_maps(labels, rng.integers(1, 6, num), 6, jitter=1.0, rng=rng)


def smooth(rng, shape, sigma):
    noise = rng.normal(size=shape).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), sigma) if sigma else noise


def pack(nucleus, energy, types):
    """Return packed maps, joined from their parts as core/schemas.py says."""
    level = np.rint((1 - energy.astype(np.float64)) * MAP_LEVEL).astype(np.uint32)
    return level + nucleus.astype(np.uint32) * MAP_NUCLEUS + (types.astype(np.uint32) << 26)


def assert_published(packed, nucleus, energy, types):
    """Compare all results of packed maps with the full scan."""
    expected = full_scan.instance_map(nucleus, energy)
    labels = label_packed(packed)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, expected)
    cells = full_scan.cell_dicts(expected, types)
    contours = pixel_contours(labels)
    for label, cell in cells.items():
        np.testing.assert_array_equal(contours[label - 1], cell["contour"])
    nuclei = nuclei_from_packed(packed, NAMES)
    assert len(nuclei) == len(cells)
    rows = sorted(cells.values(), key=lambda cell: cell["centroid"][::-1])
    for i, cell in enumerate(rows):
        assert (nuclei.centroid_px[i] - 0.5).tolist() == pytest.approx(cell["centroid"], abs=1e-9)
        assert nuclei.nucleus_type[i] == NAMES[cell["type"]]
        assert nuclei.type_prob[i] == pytest.approx(cell["type_prob"], abs=1e-6)
    return nuclei, cells


@pytest.mark.parametrize("name", ["postprocess_30", "postprocess_110"])
def test_equals_what_the_published_package_made(name):
    maps, instances, cells = oracle(name)
    packed = pack_maps(*maps)
    labels = label_packed(packed)
    np.testing.assert_array_equal(labels, instances)
    contours = pixel_contours(labels)
    for cell in cells:
        assert {tuple(point) for point in contours[cell["id"] - 1].tolist()} == {
            tuple(point) for point in cell["contour"]
        }
    nuclei = nuclei_from_packed(packed, NAMES)
    assert len(nuclei) == len(cells)
    cells.sort(key=lambda cell: cell["centroid"][::-1])
    centroids = np.add([cell["centroid"] for cell in cells], 0.5)
    np.testing.assert_allclose(nuclei.centroid_px, centroids, rtol=0, atol=1e-12)
    assert nuclei.nucleus_type.tolist() == [NAMES[cell["type"]] for cell in cells]
    np.testing.assert_allclose(nuclei.type_prob, [c["type_prob"] for c in cells], rtol=0, atol=1e-6)
    boxes = [[*cell["bbox"][0][::-1], *cell["bbox"][1][::-1]] for cell in cells]
    np.testing.assert_array_equal(nuclei.boxes_px(), boxes)


@pytest.mark.parametrize("name", ["postprocess_30", "postprocess_110"])
def test_the_full_scan_is_the_published_algorithm(name):
    maps, instances, cells = oracle(name)
    labels, found = full_scan.postprocess(*maps)
    np.testing.assert_array_equal(labels, instances)
    for cell, (label, own) in zip(cells, found.items(), strict=True):
        assert own | {"contour": own["contour"].tolist(), "id": label} == cell


@pytest.mark.parametrize("seed", range(6))
def test_network_maps_equal_the_full_scan(seed):
    binary, hv, types = network_maps(seed)
    if seed % 2:  # as a network in half precision gives them
        binary, hv, types = (
            maps.astype(np.float16).astype(np.float32) for maps in (binary, hv, types)
        )
    labels, _ = full_scan.postprocess(binary, hv, types)
    assert labels.max() > 40
    energy = full_scan.edge_energy(hv)
    assert_published(
        pack_maps(binary, hv, types), binary.argmax(axis=0), energy, types.argmax(axis=0)
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["noise", "waves", "saw", "steps", "everything", "flat"])
def test_other_maps_equal_the_full_scan(seed, kind):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(20, 110, 2))
    mask = smooth(rng, shape, rng.choice([0, 1.5, 3])) + rng.normal() * 0.1
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    pitch = float(rng.integers(8, 28))
    saw = np.stack([(x % pitch) / pitch, (y % pitch) / pitch])
    hv = {
        "noise": np.stack([smooth(rng, shape, 3), smooth(rng, shape, 3)]),
        "waves": np.stack([np.sin(x / 5), np.sin(y / 4)]),
        "saw": saw,  # equal depths everywhere
        "steps": np.round(3 * saw),
        "everything": saw,
        "flat": np.full((2, *shape), 0.37),
    }[kind].astype(np.float32)
    binary = np.stack([-mask, mask]).astype(np.float32)
    if kind == "everything":
        binary = np.stack([np.zeros(shape), np.ones(shape)]).astype(np.float32)
    types = rng.normal(size=(6, *shape)).astype(np.float32)
    nuclei, _ = assert_published(
        pack_maps(binary, hv, types),
        binary.argmax(axis=0),
        full_scan.edge_energy(hv),
        types.argmax(axis=0),
    )
    assert kind != "flat" or len(nuclei) == 0
    assert kind != "everything" or len(nuclei) > 0


@pytest.mark.parametrize("seed", range(45))
def test_packed_maps_equal_the_full_scan(seed):
    """Return maps of blobs with holes, lines and single pixels, also of tiles one pixel wide."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 70, 2))
    noise = smooth(rng, shape, rng.choice([0.6, 1, 2, 4]))
    nucleus = (noise > np.quantile(noise, rng.choice([0.1, 0.4, 0.6]))).astype(np.uint8)
    energy = smooth(rng, shape, rng.choice([1, 2, 4]))
    energy = (energy - energy.min()) / max(np.ptp(energy), 1e-9)
    energy = np.round(4 * energy) / 4 if seed % 3 == 0 else energy
    energy = np.float32(np.rint(energy * MAP_LEVEL) / MAP_LEVEL)
    types = rng.integers(0, 3, shape)
    types[rng.random(shape) < 0.5 * (seed % 2)] = 0
    assert_published(pack(nucleus, energy, types), nucleus, energy, types)


def drawn(shape, *boxes, energy=0.0):
    """Return a packed map of nuclei of type 1 in boxes (rows, columns), of one energy."""
    nucleus = np.zeros(shape, np.uint8)
    for rows, columns in boxes:
        nucleus[slice(*rows), slice(*columns)] = 1
    return nucleus, np.full(shape, energy, np.float32), np.ones(shape, np.int64)


def test_a_line_is_no_nucleus():
    nucleus, energy, types = drawn((1, 40), ((0, 1), (3, 20)))
    nuclei, cells = assert_published(pack(nucleus, energy, types), nucleus, energy, types)
    assert label_packed(pack(nucleus, energy, types)).max() == 1
    assert len(nuclei) == len(cells) == 0


def test_what_lies_in_a_hole_of_a_nucleus_belongs_to_it():
    nucleus, energy, types = drawn((40, 40), ((2, 38), (2, 38)))
    nucleus[8:32, 8:32] = 0
    nucleus[12:14, 12:28] = 1
    nucleus[20:28, 14:26] = 1
    nuclei, _ = assert_published(pack(nucleus, energy, types), nucleus, energy, types)
    assert nuclei.area_px.tolist() == [nucleus.sum()]


def test_what_is_small_or_has_no_marker_goes():
    boxes = [((2, 5), (2, 5)), ((10, 30), (2, 6)), ((10, 30), (20, 40)), ((40, 50), (0, 30))]
    nucleus, energy, types = drawn((60, 60), *boxes)
    step = int(0.4 * MAP_LEVEL)
    energy[35:] = (step + 1) / MAP_LEVEL  # just too much; the strip of 4 px is opened away
    nuclei, _ = assert_published(pack(nucleus, energy, types), nucleus, energy, types)
    assert nuclei.boxes_px().tolist() == [[20, 10, 40, 30]]
    just_less = np.full_like(energy, step / MAP_LEVEL)
    nuclei, _ = assert_published(pack(nucleus, just_less, types), nucleus, just_less, types)
    assert nuclei.boxes_px().tolist() == [[20, 10, 40, 30], [0, 40, 30, 50]]


@pytest.mark.parametrize(
    ("pixels", "name", "share"),
    [
        ({1: 60, 2: 40}, "type 1", 0.6),
        ({0: 70, 3: 30}, "type 3", 0.3),
        ({0: 50, 2: 25, 4: 25}, "type 2", 0.25),
        ({5: 50, 4: 50}, "type 4", 0.5),
        ({0: 50, 1: 50}, "type 1", 0.5),
        ({0: 100}, "type 0", 1.0),
    ],
)
def test_type_is_that_of_most_pixels_but_not_background(pixels, name, share):
    nucleus, energy, types = drawn((14, 14), ((2, 12), (2, 12)))
    types[2:12, 2:12] = np.repeat(list(pixels), list(pixels.values())).reshape(10, 10)
    nuclei, _ = assert_published(pack(nucleus, energy, types), nucleus, energy, types)
    assert nuclei.nucleus_type.tolist() == [name]
    assert nuclei.type_prob.tolist() == pytest.approx([share], abs=1e-6)


def test_layout():
    binary, hv, types = network_maps(1, num=10, side=64)
    packed = pack_maps(binary, hv, types)
    assert packed.dtype == np.uint32
    level = packed & (MAP_NUCLEUS - 1)
    np.testing.assert_array_equal(1 - level / MAP_LEVEL, full_scan.edge_energy(hv))
    np.testing.assert_array_equal((packed >> 25) & 1, binary.argmax(axis=0))
    np.testing.assert_array_equal(packed >> MAP_TYPE_SHIFT, types.argmax(axis=0))


def test_the_first_of_equal_classes():
    flat = np.zeros((2, 20, 20), np.float32)
    types = np.zeros((64, 20, 20), np.float32)
    types[[7, 9], 3, 4] = 1
    types[63, 5, 5] = -0.0
    types[63, 6, 6] = 1
    packed = pack_maps(flat, flat, types)
    assert not (packed & MAP_NUCLEUS).any()
    kinds = packed >> MAP_TYPE_SHIFT
    assert (kinds[3, 4], kinds[5, 5], kinds[6, 6]) == (7, 0, 63)


@pytest.mark.parametrize("window", [3, 20, 31, 400])
def test_window_takes_minimum_and_maximum_around_each_pixel(window):
    _, hv, _ = network_maps(2, num=12, side=60)
    hv = hv[:, :, :50]
    flat = np.zeros((2, 60, 50), np.float32)
    level = pack_maps(flat, hv, flat, window) & (MAP_NUCLEUS - 1)
    reach = window // 2
    energy = np.zeros((60, 50))
    for channel, direction in enumerate([(1, 0), (0, 1)]):
        slope = cv2.Sobel(hv[channel], cv2.CV_64F, *direction, ksize=21)
        for y in range(60):
            for x in range(50):
                near = slope[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
                share = (slope[y, x] - near.min()) / (near.max() - near.min())
                energy[y, x] = max(energy[y, x], 1 - share)
    np.testing.assert_allclose(1 - level / MAP_LEVEL, energy, atol=1e-6)


def test_a_window_of_the_whole_tile_gives_the_published_nuclei():
    maps = network_maps(3)
    np.testing.assert_array_equal(
        label_packed(pack_maps(*maps, 513)), label_packed(pack_maps(*maps))
    )


def test_with_a_window_nuclei_do_not_depend_on_what_is_far_away():
    binary, hv, types = network_maps(4, num=70)
    disturbed = hv.copy()
    disturbed[:, :12, :12] = 8 * np.sign(np.mgrid[-6:6, -6:6][::-1] + 0.5)  # far beyond -1 to 1
    far = np.s_[120:, 120:]
    clean, bad = (label_packed(pack_maps(binary, m, types)) for m in (hv, disturbed))
    assert clean[far].any()
    assert not bad[far].any()
    clean, bad = (label_packed(pack_maps(binary, m, types, 129)) for m in (hv, disturbed))
    # Numbers count the nuclei before; outlines must be the same.
    assert len(np.unique(clean[far])) > 10
    pairs = np.unique(np.stack([clean[far].ravel(), bad[far].ravel()]), axis=1)
    assert len(pairs.T) == len(np.unique(clean[far])) == len(np.unique(bad[far]))


def test_maps_are_left_as_they_are():
    maps = network_maps(5, num=20, side=96)
    copies = [m.copy() for m in maps]
    packed = pack_maps(*maps)
    for before, after in zip(copies, maps, strict=True):
        np.testing.assert_array_equal(before, after)
    packed.flags.writeable = False
    assert len(nuclei_from_packed(packed, NAMES)) > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"binary_CHW": np.zeros((3, 30, 30), np.float32)}, "binary_CHW float32"),
        ({"hv_CHW": np.zeros((2, 30, 31), np.float32)}, "of one H x W"),
        ({"hv_CHW": np.zeros((2, 30, 30))}, "hv_CHW float64"),
        ({"types_THW": np.zeros((65, 30, 30), np.float32)}, "T from 1 to 64"),
        ({"types_THW": np.zeros((0, 30, 30), np.float32)}, "T from 1 to 64"),
        ({"hv_CHW": np.full((2, 30, 30), np.nan, np.float32)}, "holds NaN"),
        ({"window_px": 2}, "window_px is 2"),
    ],
)
def test_wrong_maps_are_refused(change, message):
    flat = np.zeros((2, 30, 30), np.float32)
    maps = {"binary_CHW": flat, "hv_CHW": flat, "types_THW": flat} | change
    with pytest.raises(ValueError, match=message):
        pack_maps(**maps)


def test_wrong_packed_maps_are_refused():
    with pytest.raises(ValueError, match="uint32"):
        label_packed(np.zeros((4, 4), np.int64))
    nucleus, energy, types = drawn((20, 20), ((2, 18), (2, 18)))
    with pytest.raises(ValueError, match="holds type 1, but type_names has 1"):
        nuclei_from_packed(pack(nucleus, energy, types), NAMES[:1])
    assert len(nuclei_from_packed(pack(0 * nucleus, energy, types), NAMES[:1])) == 0
