"""Check the heaps of text in an HDF5 file, over which HDF5 would loop for ever if damaged.

Text of variable length lies in global heaps (HDF5 file format specification 3.0, III.E): the
signature GCOL, a version, the size of the heap, and objects, each with an index and a size. Index 0
is the free space at the end.
"""

import mmap

SIGNATURE = b"GCOL\x01\x00\x00\x00"
HEADER, OBJECT, ALIGN = 16, 16, 8


def has_broken_heap(content: bytes | mmap.mmap) -> bool:
    """Return whether a heap of an HDF5 file has an object that leads nowhere.

    Args:
        content: The bytes of the file.
    """
    start = content.find(SIGNATURE)
    while start >= 0:
        size = int.from_bytes(content[start + 8 : start + 16], "little")
        end = start + size
        if end > len(content) or (size >= HEADER and not _is_walkable(content, start, end)):
            return True
        start = content.find(SIGNATURE, start + ALIGN)
    return False


def _is_walkable(content: bytes | mmap.mmap, start: int, end: int) -> bool:
    """Return whether the objects of a heap follow each other up to its end."""
    place = start + HEADER
    while place + OBJECT <= end:
        index = int.from_bytes(content[place : place + 2], "little")
        size = int.from_bytes(content[place + 8 : place + 16], "little")
        # The size of the free space counts its header; that of other objects does not.
        step = size if index == 0 else OBJECT + -(-size // ALIGN) * ALIGN
        if step < OBJECT or place + step > end:
            return False
        place += step
    return True
