"""Outlines of all labels of a map, as the published CellViT gives them."""

from scipy import ndimage

from scellst_ray.nuclei.outlines import pixel_contour


def pixel_contours(labels_HW):
    """Return the outlines of labels 1 to N of a map that holds each of them."""
    boxes = ndimage.find_objects(labels_HW)
    return [pixel_contour(labels_HW, index, box) for index, box in enumerate(boxes)]
