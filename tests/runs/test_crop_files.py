import hashlib
import json

import cv2  # noqa: F401 - loaded before examples are timed
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from scellst_ray.core import schemas
from scellst_ray.runs.crop_files import (
    NO_CUTOFF,
    ROW_GROUP,
    ColourSums,
    CropSample,
    Cutoff,
    Spool,
    decode_into,
    draw,
    encode,
    permutation,
    priorities,
    splitmix64,
)
from tests.support.crop_runs import numbered, numbers_of

MASK = (1 << 64) - 1


def published_step(state):
    """Return one step of the published generator, computed with Python's integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def draw_slowly(sample, slide_id, cell_ids, types):
    """Draw one cell after the other, lowest number first."""
    text = json.dumps(["crop", str(sample.seed), slide_id]).encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
    numbers = {c: published_step((published_step(c) + key) & MASK) for c in cell_ids}
    type_of, taken, per_type = dict(zip(cell_ids, types, strict=True)), [], {}
    for cell in sorted(cell_ids, key=numbers.get):
        num = per_type[type_of[cell]] = per_type.get(type_of[cell], 0) + 1
        if sample.per_type is None or num <= sample.per_type:
            taken.append(cell)
    most = min(sample.total, sample.per_slide or sample.total)
    return taken[:most], [numbers[cell] for cell in taken[:most]]


def test_the_generator_is_the_published_one():
    assert splitmix64(np.zeros(1, np.uint64))[0] == 0xE220A8397B1DCDAF
    values = np.array([0, 1, 7, 1 << 40, MASK], np.uint64)
    assert splitmix64(values).tolist() == [published_step(int(value)) for value in values]


def test_permutations_are_uniform_and_named_by_their_parts():
    assert sorted(permutation(100, 1, 2)) == list(range(100))
    assert permutation(100, 1, 2).tolist() != permutation(100, 12).tolist()
    assert permutation(0, 3).tolist() == []
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), permutation(6, seed)] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


@given(
    st.lists(st.integers(0, 1 << 50), unique=True, max_size=60),
    st.integers(1, 40),
    st.none() | st.integers(1, 40),
    st.none() | st.integers(1, 15),
    st.integers(0, 5),
)
def test_draws_what_the_slow_twin_draws(cell_ids, total, per_slide, per_type, seed):
    sample = CropSample(total, per_slide, per_type, seed)
    types = ["abc"[c % 3] for c in cell_ids]
    expected, numbers = draw_slowly(sample, "s", cell_ids, types)
    for order in (slice(None), slice(None, None, -1)):
        ids = np.array(cell_ids, np.int64)[order]
        index, priority = draw(sample, "s", ids, pa.array(types[order], pa.string()))
        assert ids[index].tolist() == expected
        assert priority.tolist() == numbers


def test_a_sample_is_uniform_and_grows_by_adding():
    ids = np.arange(40) * (1 << 20)
    types = pa.array(["t"] * 40)
    counts = np.zeros(40)
    for seed in range(2000):
        index, _ = draw(CropSample(10, seed=seed), "s", ids, types)
        counts[index] += 1
    # Without replacement: counts vary less than a multinomial's, by (N - n) / (N - 1).
    statistic = ((counts - 500) ** 2 / 500).sum() * 39 / 30
    assert 1e-3 < stats.chi2.sf(statistic, 39) < 1 - 1e-3
    small, large = (draw(CropSample(n), "s", ids, types)[0] for n in (10, 25))
    assert large[:10].tolist() == small.tolist()


@given(
    st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=6),
    st.integers(1, 30),
    st.randoms(),
)
def test_the_cutoff_lets_in_as_many_as_fit(slides, total, random):
    everything = sorted(number for slide in slides for number in slide)
    fitting = [c for c in {-1, *everything} if sum(n <= c for n in everything) <= total]
    expected = sum(n <= max(fitting) for n in everything)
    random.shuffle(slides)
    cutoff = Cutoff(total)
    for slide in slides:
        cutoff.add(np.array(slide, np.uint64))
    value = cutoff.value()
    # A priority of 0 is below any cutoff; its probability is 1 in 2**64.
    if not (value == 0 and 0 in everything):
        assert sum(n <= value for n in everything) == expected
    assert (value == NO_CUTOFF) == (len(everything) <= total)


def test_the_cutoff_forgets_what_cannot_matter():
    numbers = priorities(0, "s", np.arange(3_000_000))
    cutoff = Cutoff(1000)
    for part in np.array_split(numbers, 30):
        cutoff.add(np.sort(part))
    assert cutoff.num < 1_200_000
    assert cutoff.value() == np.sort(numbers)[999]


def test_moments_are_those_of_all_pixels_together():
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (50, 72, 72, 3), np.uint8)
    crops[:20] //= 3  # another spread, so that a mean of deviations would differ
    parts, whole = [ColourSums(), ColourSums()], ColourSums()
    parts[0].add(crops[:7])
    parts[1].add(crops[7:])
    for part in parts:
        whole.join(**vars(part))
    values = crops[:, 12:60, 12:60].reshape(-1, 3) / 255
    mean, std = whole.mean_std()
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(axis=0), rtol=1e-12)
    assert ColourSums().mean_std() == ((0, 0, 0), (0, 0, 0))


def test_coding_keeps_colours():
    ramp = np.linspace(90, 240, 72)
    crop = np.stack(np.broadcast_arrays(ramp[:, None], 160.0, ramp[None] / 2), axis=-1)
    crop = np.rint(np.broadcast_to(crop, (72, 72, 3))).astype(np.uint8)
    out = np.empty((1, 72, 72, 3), np.uint8)
    decode_into([np.frombuffer(encode(crop), np.uint8)], out)
    assert np.abs(out[0].astype(int) - crop).mean() < 1


def test_a_damaged_crop_is_reported():
    image = np.frombuffer(encode(np.zeros((72, 72, 3), np.uint8)), np.uint8)
    for bad in (image[:30], np.zeros(50, np.uint8)):
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode_into([bad], np.empty((1, 72, 72, 3), np.uint8))


def test_a_file_has_its_rows_in_their_order_and_says_what_it_is(tmp_path):
    num = ROW_GROUP + 5
    cells = pa.table(
        {
            "slide_id": pa.repeat("s", num),
            "cell_id": np.arange(num) * 7,
            "nucleus_type": pa.repeat("nucleus", num),
        }
    )
    digests = []
    for name, rows in (("a", np.arange(num)), ("b", np.arange(num)[::-1])):
        with Spool(num) as spool:
            for part in np.array_split(rows, 3):
                spool.add(part, numbered(part))
            digests.append(spool.publish(str(tmp_path / name), cells, "d1"))
    # The file does not depend on the order in which crops were cut.
    assert digests[0] == digests[1]
    file = pq.ParquetFile(tmp_path / "a")
    assert [file.metadata.row_group(i).num_rows for i in range(2)] == [ROW_GROUP, 5]
    schemas.check(file.schema_arrow, "CROPS", "a")
    metadata = file.schema_arrow.metadata
    names = ("codec", "crop_um", "crop_px", "run_digest")
    values = [metadata[b"scellst_ray." + name.encode()] for name in names]
    assert values == [b"jpeg", b"18.0", b"72", b"d1"]
    table = file.read()
    assert table["cell_id"].to_pylist() == (np.arange(num) * 7).tolist()
    out = np.empty((num, 72, 72, 3), np.uint8)
    decode_into([np.frombuffer(image.as_py(), np.uint8) for image in table["image"]], out)
    assert numbers_of(out).tolist() == list(range(num))
