"""Replaces, as soon as their modules are imported, the functions that ask torch for GPUs."""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec

# Replaced names and their replacements, by module. A node says that torch can use 64 GPUs, any
# number that Ray may count.
REPLACEMENTS = {
    "scellst_ray.models.device": ("device_of_worker", lambda **_: "cpu"),
    "scellst_ray.preflight.nodes": ("COUNT_GPUS", "print(64)"),
}


class Replacing(Loader):
    """Load a module as usual, then replace one of its names."""

    def __init__(self, loader, name, value):
        self.loader, self.name, self.value = loader, name, value

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        setattr(module, self.name, self.value)


class Finder(MetaPathFinder):
    """Find the modules of REPLACEMENTS, each once."""

    def __init__(self):
        self.left = dict(REPLACEMENTS)

    def find_spec(self, fullname, _path=None, _target=None):
        replacement = self.left.pop(fullname, None)
        if replacement is None:
            return None
        spec = find_spec(fullname)
        spec.loader = Replacing(spec.loader, *replacement)
        return spec


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, Finder())
