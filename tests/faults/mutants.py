"""Slides broken by a seeded generator: flipped bits, cuts, false tags, absurd sizes, bombs."""

import io
import os
import random
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from scellst_ray.slides.synthetic.slide import SyntheticConfig, make_tissue, render
from scellst_ray.slides.synthetic.tiff import write_slide

MPP = 0.5
TILE_PX = 128
# Every tenth slide is whole.
INTACT_EVERY = 10
# A bomb is without tissue: with it, it would be a large slide, and all of it be done.
BLANK = b"\xf0\xf0\xf0"
WIDTH, LENGTH, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTES = 256, 257, 322, 323, 324, 325
SIZES = (0, 1, 2**14, 2**16, 2**18, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
NAMES = (
    *("svs", "tif", "tiff", "ndpi", "mrxs", "vms", "scn", "bif", "svslide", "dcm", "czi"),
    *("png", "jpg", "jp2", "eps", "pdf", "gif"),
)


@dataclass(frozen=True)
class Source:
    """An intact slide: its bytes, how its file is called, and the mpp that it lacks."""

    name: str
    suffix: str
    content: bytes
    mpp: float | None

    @property
    def is_tiff(self):
        return self.content[:2] == b"II"


@dataclass(frozen=True)
class Made:
    """A slide of the cohort; `kind` is 'intact' or what was done to it."""

    slide_id: str
    kind: str
    source: str
    path: Path
    mpp: float | None


def sources(folder, seed=0):
    """Return one picture as slides of several formats; `folder` is for passing files."""
    config = SyntheticConfig(seed=seed, width_um=200.0, height_um=150.0, mpp=MPP, num_genes=4)
    tissue = make_tissue(config)
    image = render(tissue)
    half = np.asarray(Image.fromarray(image).resize((200, 150), Image.Resampling.BOX))
    pyramid = [image, half]
    deflate = write_slide(folder / "deflate.tiff", tissue.layout).read_bytes()
    aperio = (
        "Aperio Image Library v11.2.1\r\n400x300 [0,0 400x300] (128x128) JPEG/RGB Q=90"
        f"|AppMag = 20|MPP = {MPP}"
    )
    made = [
        ("deflate", "tiff", deflate, None),
        ("bigtiff", "tiff", _tiff(pyramid, bigtiff=True, compression="adobe_deflate"), None),
        ("jpeg", "tiff", _tiff(pyramid, "JPEG", compression="jpeg"), None),
        ("aperio", "svs", _tiff(pyramid, "JPEG", compression="jpeg", description=aperio), None),
        ("j2k", "svs", _tiff(pyramid, "JPEG2000", compression=33005, description=aperio), None),
        ("ome", "ome.tiff", _ome(image), None),
        ("plain", "tif", _plain(image, "TIFF", compression="tiff_lzw"), MPP),
        ("png", "png", _plain(image, "PNG"), MPP),
        ("jpg", "jpg", _plain(image, "JPEG", quality=90), MPP),
    ]
    return [Source(*one) for one in made]


def _plain(image, form, **options):
    out = io.BytesIO()
    Image.fromarray(image).save(out, form, **options)
    return out.getvalue()


def _tiff(levels, codec=None, *, bigtiff=False, description=None, **options):
    """Return a tiled pyramid; tiles are encoded by Pillow where `codec` names one."""
    out = io.BytesIO()
    with tifffile.TiffWriter(out, bigtiff=bigtiff) as tiff:
        for number, level in enumerate(levels):
            mpp = MPP * levels[0].shape[1] / level.shape[1]
            tiff.write(
                _encoded(level, codec) if codec else level,
                shape=level.shape,
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="ycbcr" if codec == "JPEG" else "rgb",
                # Of Aperio's slides all levels are of full kind.
                subfiletype=int(number > 0 and description is None),
                subsampling=(1, 1) if codec == "JPEG" else None,
                description=description,
                resolution=(1e4 / mpp, 1e4 / mpp),
                resolutionunit="CENTIMETER",
                metadata=None,
                **options,
            )
    return out.getvalue()


def _encoded(level, codec):
    height, width = level.shape[:2]
    pad = ((0, -height % TILE_PX), (0, -width % TILE_PX), (0, 0))
    padded = np.pad(level, pad, mode="edge")
    options = {"quality": 90, "subsampling": 0} if codec == "JPEG" else {"no_jp2": True}
    for y in range(0, height, TILE_PX):
        for x in range(0, width, TILE_PX):
            yield _plain(padded[y : y + TILE_PX, x : x + TILE_PX], codec, **options)


def _ome(image):
    out = io.BytesIO()
    with tifffile.TiffWriter(out, ome=True) as tiff:
        tiff.write(
            image,
            tile=(TILE_PX, TILE_PX),
            photometric="rgb",
            compression="adobe_deflate",
            resolution=(1e4 / MPP, 1e4 / MPP),
            resolutionunit="CENTIMETER",
            metadata={"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP},
        )
    return out.getvalue()


# TIFF directories, little-endian, as tifffile and Pillow write them.


@dataclass(frozen=True)
class Entry:
    """Where a tag's entry lies in the file, and what it says."""

    at: int
    tag: int
    big: bool

    @property
    def size(self):
        return 20 if self.big else 12

    def put(self, data, *, tag=None, kind=None, count=None, value=None):
        """Overwrite some of the entry."""
        count_form, width = ("<Q", 8) if self.big else ("<I", 4)
        if tag is not None:
            struct.pack_into("<H", data, self.at, tag)
        if kind is not None:
            struct.pack_into("<H", data, self.at + 2, kind)
        if count is not None:
            struct.pack_into(count_form, data, self.at + 4, count)
        if value is not None:
            struct.pack_into(count_form, data, self.at + 4 + width, value)


def directories(data):
    """Return of each directory its entries and where it tells of the next one."""
    big = data[2] == 43
    form, width, size, num_form = ("<Q", 8, 20, "<Q") if big else ("<I", 4, 12, "<H")
    link = 8 if big else 4
    found = []
    (at,) = struct.unpack_from(form, data, link)
    while at:
        (num,) = struct.unpack_from(num_form, data, at)
        first = at + struct.calcsize(num_form)
        starts = [first + number * size for number in range(num)]
        tags = [Entry(start, struct.unpack_from("<H", data, start)[0], big) for start in starts]
        link = first + num * size
        found.append((tags, link))
        (at,) = struct.unpack_from(form, data, link)
    assert width in (4, 8)
    return found


# Mutators: (random, source) to the bytes of a broken slide.


def flipped(rng, source):
    """Flip bits anywhere."""
    data = bytearray(source.content)
    for _ in range(rng.choice((1, 4, 16, 64, 400))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def flipped_head(rng, source):
    """Flip a few bits where the file says what it is."""
    data = bytearray(source.content)
    places = list(range(min(64, len(data))))
    if source.is_tiff:
        for tags, link in directories(data):
            places += range(tags[0].at, link + 4)
    for _ in range(rng.randint(1, 6)):
        data[rng.choice(places)] ^= 1 << rng.randrange(8)
    return data


def cut(rng, source):
    """Lose the end; now and then nearly all."""
    length = len(source.content)
    return source.content[: rng.choice((rng.randrange(1, 200), rng.randrange(1, length)))]


def grown(rng, source):
    """Append junk, or a part of the file again."""
    junk = rng.choice((rng.randbytes(rng.randrange(1, 50_000)), source.content[-5000:] * 3))
    return source.content + junk


def spliced(rng, source):
    """Overwrite, remove or insert a stretch: zeros, ones, or another part of the file."""
    data = bytearray(source.content)
    at, length = rng.randrange(len(data)), rng.choice((1, 2, 16, 512, 8192))
    other = rng.randrange(len(data))
    piece = rng.choice((b"\0" * length, b"\xff" * length, bytes(data[other : other + length])))
    data[at : at + rng.choice((0, length))] = rng.choice((b"", piece))
    return data


def retagged(rng, source):
    """Give tags another number, type, count or value, or swap two of them."""
    if not source.is_tiff:
        return flipped_head(rng, source)
    data = bytearray(source.content)
    tags = rng.choice(directories(data))[0]
    for _ in range(rng.randint(1, 3)):
        one, other = rng.sample(tags, 2)
        how = rng.randrange(5)
        if how == 0:
            one.put(data, tag=other.tag)
        elif how == 1:
            one.put(data, kind=rng.randrange(20))
        elif how == 2:
            one.put(data, count=rng.choice(SIZES))
        elif how == 3:
            one.put(data, value=rng.choice((*SIZES, rng.randrange(2**32))))
        else:
            here, there = (slice(entry.at + 2, entry.at + entry.size) for entry in (one, other))
            data[here], data[there] = data[there], data[here]
    return data


def relinked(rng, source):
    """Send offsets astray: the chain of directories in a circle, tiles out of the file."""
    if not source.is_tiff:
        return flipped(rng, source)
    data = bytearray(source.content)
    found = directories(data)
    tags, link = rng.choice(found)
    first = found[0][0][0].at - (8 if tags[0].big else 2)
    places = (first, link, 1, rng.randrange(len(data)), len(data) - 1, len(data) + 1000, 2**32 - 2)
    how = rng.randrange(3)
    if how == 0:
        struct.pack_into("<I", data, link, rng.choice(places))
    elif how == 1:
        rng.choice(tags).put(data, value=rng.choice(places))
    else:
        # Of the tiles' tables: offsets of single tiles.
        wanted = rng.choice((TILE_OFFSETS, TILE_BYTES))
        entry = next((tag for tag in tags if tag.tag == wanted), rng.choice(tags))
        (at,) = struct.unpack_from("<I", data, entry.at + (12 if entry.big else 8))
        at = min(at, len(data) - 8)
        struct.pack_into("<I", data, at + 4 * rng.randrange(2), rng.choice(places))
    return data


def huge(rng, source):
    """Claim absurd sizes of the image, of its tiles, or both."""
    data = bytearray(source.content)
    if source.is_tiff:
        sides = (WIDTH, LENGTH, TILE_WIDTH, TILE_LENGTH)
        wanted = rng.sample(sides, rng.randint(1, 4))
        for tags, _ in directories(data)[: rng.randint(1, 2)]:
            for entry in tags:
                if entry.tag in wanted:
                    entry.put(data, kind=4, value=rng.choice(SIZES[2:]))
    elif source.name == "png":
        width, height = (rng.choice(SIZES[2:-2]) for _ in range(2))
        head = b"IHDR" + struct.pack(">II", width, height) + bytes(data[24:29])
        data[12:33] = head + struct.pack(">I", zlib.crc32(head))
    else:
        at = data.index(b"\xff\xc0")
        struct.pack_into(">HH", data, at + 5, *(rng.choice((2**14, 2**15, 65500)) for _ in "xy"))
    return data


def bomb(rng, source):
    """Return few bytes that decompress to gigabytes."""
    return rng.choice((_big_tiles, _many_tiles, _big_strips, _big_png, _big_text))(rng, source)


@cache
def _deflated(row, times):
    """Return a row many times over in zlib's form; a block of rows is packed once."""
    rows = max(1, min(times, 2**22 // len(row)))
    times = -(-times // rows)
    packer = zlib.compressobj(9)
    block, check = row * rows, 1
    head, again = (packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    for _ in range(times):
        check = zlib.adler32(block, check)
    return head + again * (times - 1) + b"\x03\0" + struct.pack(">I", check)


def _written(shape, side, segments, **options):
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as tiff:
        tiff.write(
            segments,
            shape=shape,
            dtype=np.uint8,
            photometric="rgb",
            compression="adobe_deflate",
            resolution=(1e4 / MPP, 1e4 / MPP),
            resolutionunit="CENTIMETER",
            metadata=None,
            **({"tile": (side, side)} if side else {}),
            **options,
        )
    return out.getvalue()


def _big_tiles(rng, _):
    side = rng.choice((4096, 8192, 20480))
    tile = _deflated(BLANK * side, side)
    return _written((side, side, 3), side, iter([tile]))


def _many_tiles(rng, _):
    """All tiles of a large blank slide are one: their offsets are set to that of the first."""
    side, num = 256, rng.choice((32, 64))
    tile = _deflated(BLANK * side, side)
    data = bytearray(_written((num * side, num * side, 3), side, iter([tile] * num * num)))
    ((tags, _),) = directories(data)
    for entry in tags:
        if entry.tag == TILE_OFFSETS:
            (table,) = struct.unpack_from("<I", data, entry.at + 8)
            first = struct.unpack_from("<I", data, table)
            struct.pack_into(f"<{num * num}I", data, table, *first * num * num)
    return data


def _big_strips(rng, _):
    height, width = rng.choice(((8_000, 8_000), (30_000, 40_000)))
    strip = _deflated(BLANK * width, height)
    return _written((height, width, 3), None, iter([strip]), rowsperstrip=height)


def _big_png(rng, _):
    side = rng.choice((8_000, 12_000, 60_000))
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    # Decoding would go on to the end of the data: a little suffices, since the image is refused.
    rows = _deflated(b"\0" + BLANK * side, min(side, 20_000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, (head, b"IDAT" + rows, b"IEND")))


def _big_text(rng, source):
    if source.name != "png":
        return _big_png(rng, source)
    text = _deflated(b"a" * 2**20, 1024)
    chunk = _chunk(rng.choice((b"zTXtnote\0\0", b"iCCPicc\0\0")) + text)
    return source.content[:33] + chunk + source.content[33:]


def _chunk(content):
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


def foreign(rng, _):
    """Return the beginning of some other kind of file."""
    head = rng.choice(
        (
            b"PK\x03\x04\x14\0\0\0\x08\0",
            b"\x1f\x8b\x08\0\0\0\0\0",
            b"SQLite format 3\0\x10\0\x01\x01\0",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 400 300\n%%EndComments\nshowpage\n",
            b"%PDF-1.7\n",
            b"\x89HDF\r\n\x1a\n",
            b"GIF89a\x90\x01\x2c\x01\xf7\0\0",
            b"\0" * 128 + b"DICM\x02\0\0\0UL\x04\0",
            b"\0\0\0\x0cjP  \r\n\x87\n",
            b"[Virtual Microscope Specimen]\nNoLayers=1\nImageFile=a.jpg\n",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"MM\0*\0\0\0\x08\0\0",
            b"II*\0\x08\0\0\0\0\0\0\0\0\0",
            b"ZISRAWFILE\0\0\0\0\0\0",
            b"",
        )
    )
    return head + rng.randbytes(rng.choice((0, 100, 20_000)))


def empty(_rng, _source):
    """Return nothing."""
    return b""


MUTATORS = {
    flipped: 17,
    flipped_head: 17,
    retagged: 16,
    relinked: 10,
    cut: 11,
    huge: 9,
    spliced: 7,
    foreign: 5,
    grown: 3,
    bomb: 3,
    empty: 2,
}
KINDS = sorted({"intact", "no_file", *(mutator.__name__ for mutator in MUTATORS)})


def write_cohort(folder, num_mutants, seed=0):
    """Write mutants, an intact slide after every nine of them, and `manifest.csv`.

    Returns:
        What was made, in the order of the manifest.
    """
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    whole = sources(folder)
    (folder / "deflate.tiff").unlink()
    made, num = [], 0
    while num < num_mutants:
        number = len(made)
        source = whole[number % len(whole)]
        if number % INTACT_EVERY == INTACT_EVERY - 1:
            path = folder / f"s{number:04d}.{source.suffix}"
            path.write_bytes(source.content)
            made.append(Made(f"s{number:04d}", "intact", source.name, path, source.mpp))
            continue
        made.append(_mutant(folder, number, source, rng))
        num += 1
    lines = [f"{m.slide_id},{m.path.name},{'' if m.mpp is None else m.mpp}\n" for m in made]
    (folder / "manifest.csv").write_text("slide_id,uri,mpp\n" + "".join(lines))
    return made


def _mutant(folder, number, source, rng):
    (mutator,) = rng.choices(list(MUTATORS), list(MUTATORS.values()))
    kind = mutator.__name__
    suffix = rng.choice(NAMES) if kind in ("foreign", "empty") else source.suffix
    path = folder / f"s{number:04d}.{suffix}"
    # Most slides tell their resolution; some have one given, so that they are read at all.
    mpp = MPP if source.mpp or kind in ("bomb", "huge") or rng.random() < 0.3 else None
    if kind == "empty" and rng.random() < 0.6:
        kind = "no_file"
        rng.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")))()
    else:
        path.write_bytes(mutator(rng, source))
    return Made(f"s{number:04d}", kind, source.name, path, mpp)
