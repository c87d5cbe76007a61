#!/usr/bin/env bash
# Pillow 13.0.0: a TIFF of RGB with 16 bits a channel in separate planes (PlanarConfiguration 2) opens
# as RGB and is read as if its samples had 8 bits: every other byte of half of each plane. No error,
# no warning; the picture is another one. Interleaved 16 bits and planes of 8 bits are read well.
# OpenSlide reads such planes well if they are tiled. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet \
    pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import numpy as np
import tifffile
from PIL import Image

image = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
planes = np.moveaxis(image, -1, 0)
pictures = {
    "interleaved, 16 bits": (image.astype(np.uint16) * 257, "contig"),
    "planes, 8 bits": (planes, "separate"),
    "planes, 16 bits": (planes.astype(np.uint16) * 257, "separate"),
}
equal = {}
for name, (array, config) in pictures.items():
    path = f"{sys.argv[1]}/picture.tif"
    tifffile.imwrite(path, array, photometric="rgb", planarconfig=config, metadata=None)
    with Image.open(path) as opened:
        assert opened.mode == "RGB"
        equal[name] = bool(np.array_equal(np.asarray(opened), image))
print(equal)
wanted = {"interleaved, 16 bits": True, "planes, 8 bits": True, "planes, 16 bits": False}
assert equal == wanted, "Pillow reads planes of 16 bits differently"
PY
