#!/usr/bin/env bash
# OpenSlide 4.0.1 (openslide-python 1.4.7): the place given to `read_region` is in pixels of level 0.
# On a coarser level a place between two pixels is rounded towards 0: down if it is positive, up if it
# is negative. So of two windows that a program sets 30 level-0 px apart, one on each side of the
# slide's edge, the outer one lies up to one level pixel (here 16 level-0 px) too far in, and a tile
# with a margin over the edge is shifted against its neighbours. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet \
  openslide-python==1.4.7 openslide-bin==4.0.1.2 tifffile==2026.3.3 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import math

import numpy as np
import openslide
import tifffile

# Red counts the pixels of the second level, which has a sixteenth of the width, from 1.
red = 1 + np.arange(4096) // 16 % 255
image = np.zeros((4096, 4096, 3), np.uint8)
image[..., 0] = red
with tifffile.TiffWriter("slide.tif") as file:
    file.write(image, tile=(256, 256), photometric="rgb")
    file.write(image[::16, ::16].copy(), tile=(256, 256), photometric="rgb", subfiletype=1)
slide = openslide.OpenSlide("slide.tif")
assert slide.level_downsamples == (1.0, 16.0)


def place(x0: int) -> int:
    """Return the level pixel that a window at x0 begins with, from the first pixel with content."""
    row = np.asarray(slide.read_region((x0, 0), 1, (16, 1)))[0]
    first = int(np.flatnonzero(row[:, 3])[0])
    return int(row[first, 0]) - 1 - first


print("OpenSlide", openslide.__library_version__)
print("place / 16, rounded down, read by OpenSlide")
for x0 in (-42, -30, -12, 12, 30, 42):
    print(x0 / 16, math.floor(x0 / 16), place(x0))
    assert place(x0) == math.trunc(x0 / 16), "places are no longer rounded towards 0"
assert place(-12) == place(12) == 0
PY
