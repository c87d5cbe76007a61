"""GPUs in name only: Ray counts them, and workers that have one compute on the CPU.

Python imports `sitecustomize` at its start wherever this folder is on PYTHONPATH. So `ENVIRONMENT`
reaches every process that a command, a raylet or a worker starts, and the product needs no switch.
"""

import os
from pathlib import Path

from tests.support.pretended_gpu.sitecustomize import REPLACEMENTS

_PATHS = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(path for path in _PATHS if path)}


def pretend_in_this_process(monkeypatch):
    """Pretend in a process that has started without `ENVIRONMENT`."""
    for module, (name, value) in REPLACEMENTS.items():
        monkeypatch.setattr(f"{module}.{name}", value)
