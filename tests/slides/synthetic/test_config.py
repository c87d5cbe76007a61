import pytest

from scellst_ray.slides.synthetic.config import SyntheticConfig


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mpp": 0.0}, "mpp=0.0 is outside"),
        ({"mpp": float("nan")}, "mpp=nan is outside"),
        ({"num_genes": 0}, "num_genes=0"),
        ({"capture_efficiency": 1.5}, "capture_efficiency"),
        ({"spot_layout": "line"}, "expected 'hex' or 'square'"),
    ],
)
def test_impossible_configs_are_refused(values, expected):
    with pytest.raises(ValueError, match=expected):
        SyntheticConfig(**values)


def test_streams_depend_on_name_keys_and_seed_alone():
    def draw(config, *names):
        return config.stream(*names).random()

    config = SyntheticConfig(seed=3)
    again, other = SyntheticConfig(seed=3, num_genes=7, stain_seed=8), SyntheticConfig(seed=4)
    assert draw(config, "nuclei") == draw(again, "nuclei")
    numbers = {draw(config, "nuclei"), draw(config, "counts"), draw(config, "nuclei", 1)}
    assert len(numbers | {draw(other, "nuclei")}) == 4
    assert config.stain_stream("noise").random() == draw(config, "noise")
    stained = SyntheticConfig(seed=8).stream("noise").random()
    assert again.stain_stream("noise").random() == stained


def test_sizes_in_px_follow_um_and_mpp():
    config = SyntheticConfig(width_um=640.0, height_um=420.0, mpp=0.25)
    assert (config.width0, config.height0) == (2560, 1680)
