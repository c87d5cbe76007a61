"""DICOM whole-slide images: one file a level, JPEG tiles, explicit VR in little endian."""

import io
import struct

import numpy as np
from PIL import Image

CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
JPEG = "1.2.840.10008.1.2.4.50"


def element(group, number, kind, value):
    """Return a DICOM element."""
    if isinstance(value, str):
        value = value.encode()
        value += (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    head = struct.pack("<HH", group, number) + kind.encode()
    if kind in ("OB", "SQ"):
        return head + b"\0\0" + struct.pack("<I", len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def sequence(group, number, item):
    """Return a sequence of one item."""
    return element(group, number, "SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item)


def tiles(image, side):
    """Yield the JPEG tiles of an image, of even length."""
    height, width = image.shape[:2]
    for y in range(0, height, side):
        for x in range(0, width, side):
            part = np.full((side, side, 3), 244, np.uint8)
            piece = image[y : y + side, x : x + side]
            part[: piece.shape[0], : piece.shape[1]] = piece
            coded = io.BytesIO()
            Image.fromarray(part).save(coded, "JPEG", quality=95, subsampling=1)
            yield coded.getvalue() + b"\0" * (len(coded.getvalue()) % 2)


def dicom_level(image, mpp, instance, series="1.2.826.0.1.7.1", side=128, syntax=JPEG):
    """Return the file of one level of a DICOM slide."""
    height, width = image.shape[:2]
    frames = list(tiles(image, side))
    uid = f"{series}.{instance}"
    meta = b"".join(
        [
            element(2, 1, "OB", b"\0\1"),
            element(2, 2, "UI", CLASS),
            element(2, 3, "UI", uid),
            element(2, 0x10, "UI", syntax),
            element(2, 0x12, "UI", "1.2.3.4"),
        ]
    )
    spacing = f"{mpp / 1000:.7f}\\{mpp / 1000:.7f}"
    measures = element(0x18, 0x50, "DS", "0.001") + element(0x28, 0x30, "DS", spacing)
    shorts = {0x10: side, 0x11: side, 0x100: 8, 0x101: 8, 0x102: 7, 0x103: 0}
    data = [
        element(8, 8, "CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE"),
        *(element(8, 0x16, "UI", CLASS), element(8, 0x18, "UI", uid), element(8, 0x60, "CS", "SM")),
        *(element(0x20, 0xD, "UI", "1.2.826.0.1.8"), element(0x20, 0xE, "UI", series)),
        *(element(0x20, 0x13, "IS", "1"), element(0x20, 0x9311, "CS", "TILED_FULL")),
        *(element(0x28, 2, "US", struct.pack("<H", 3)), element(0x28, 4, "CS", "YBR_FULL_422")),
        element(0x28, 6, "US", struct.pack("<H", 0)),
        element(0x28, 8, "IS", str(len(frames))),
        *(element(0x28, number, "US", struct.pack("<H", n)) for number, n in shorts.items()),
        element(0x48, 6, "UL", struct.pack("<I", width)),
        element(0x48, 7, "UL", struct.pack("<I", height)),
        element(0x48, 0x303, "UL", struct.pack("<I", 1)),
        sequence(0x5200, 0x9229, sequence(0x28, 0x9110, measures)),
    ]
    starts = np.cumsum([0, *(8 + len(frame) for frame in frames[:-1])]).astype("<u4").tobytes()
    items = [starts, *frames]
    pixels = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in items)
    head = b"\0" * 128 + b"DICM" + element(2, 0, "UL", struct.pack("<I", len(meta))) + meta
    start = struct.pack("<HH", 0x7FE0, 0x10) + b"OB\0\0" + b"\xff" * 4
    return head + b"".join(data) + start + pixels + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
