"""The configuration of the synthetic slide that the tests of slides/synthetic share."""

from scellst_ray.slides.synthetic.config import SyntheticConfig

SMALL = SyntheticConfig(seed=4, width_um=640.0, height_um=420.0, mpp=0.5)
