"""The libraries whose releases change pixels, crops or nuclei."""

import cv2
import openslide


def pixel_libraries() -> dict[str, str]:
    """Return major and minor version of each library that decides pixels, by name.

    OpenCV 4.10 and 4.13 cut other crops than 5.0 (`warpAffine`, up to 5 grey levels). Measured on
    the same slides, releases of Pillow (11.0, 12.0, 13.0), OpenSlide (4.0.0, 4.0.1), scikit-image
    (0.25, 0.26), scipy (1.16, 1.17) and numpy (2.3, 2.4) gave the same pixels, crops and nuclei.
    OpenSlide is named since it decodes all pixels.
    """
    found = {"OpenCV": cv2.__version__, "OpenSlide": openslide.__library_version__}
    return {name: ".".join(version.split(".")[:2]) for name, version in found.items()}
