import re
import tomllib

import scellst_ray
from scellst_ray.core.version import __version__
from tests.support.paths import ROOT


def test_the_release_is_said_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert scellst_ray.__version__ == __version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = project["tool"]["setuptools"]["dynamic"]["version"]
    assert version == {"attr": "scellst_ray.core.version.__version__"}
