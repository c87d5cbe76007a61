"""Mutations of files: of their bytes, as for slides, and of what the bytes mean.

Every mutator takes a random generator and the bytes of an intact file and returns other bytes.
"""

import gzip
import io
import json
import random
import shutil
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GZIP = b"\x1f\x8b"
# Values of other kinds, absurd or none.
VALUES = (
    *(None, True, "", "x", "1e400", "NaN", [], {}, [[]], [None], {"a": 1}, [1, [2, [3]]]),
    *(0, -1, 1e308, -1e308, 1e-320, 10**30, 2**63, 2**31, 0.5, "\0", "a" * 5000, "\ud800"),
    *(float("nan"), float("inf"), float("-inf"), ["a", 1, None], "\x1b[31mred", "line\nline"),
)


def flipped(rng, data):
    """Flip bits anywhere."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 16, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def flipped_ends(rng, data):
    """Flip bits at the beginning or the end, where files say what they are."""
    data = bytearray(data)
    reach = min(len(data), 512)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(reach)
        data[at if rng.random() < 0.5 else len(data) - 1 - at] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(rng, data):
    """Lose the end; now and then nearly all."""
    return data[: rng.choice((rng.randrange(1, 64), rng.randrange(1, len(data) + 1)))]


def zeroed(rng, data):
    """Overwrite a block with zeros or ones."""
    at, length = _block(rng, data)
    return data[:at] + rng.choice((b"\0", b"\xff")) * length + data[at + length :]


def swapped(rng, data):
    """Let two blocks change places."""
    at, length = _block(rng, data)
    other = rng.randrange(len(data))
    new = bytearray(data)
    first, second = data[at : at + length], data[other : other + length]
    new[at : at + length] = second
    new[other : other + length] = first
    return bytes(new)


def repeated(rng, data):
    """Repeat a block, or the whole file."""
    at, length = rng.choice((_block(rng, data), (0, len(data))))
    piece = data[at : at + length]
    return data[: at + length] + piece * rng.choice((1, 3)) + data[at + length :]


def inserted(rng, data):
    """Insert junk, or remove a block."""
    at, length = _block(rng, data)
    junk = rng.choice((rng.randbytes(length), b"\0" * length, b"", b"\r\n", b"\xef\xbb\xbf", b'"'))
    return data[:at] + junk + data[at + (length if not junk else 0) :]


def foreign(rng, _data):
    """Return the beginning of another kind of file, or nothing."""
    head = rng.choice(
        (
            *(b"", b"\0", b"\n", b"{", b"[", b"null", b"[]", b"{}", b"PAR1", b"PAR1PAR1", b"5"),
            *(b"PK\x03\x04\x14\0\0\0\x08\0", GZIP + b"\x08\0\0\0\0\0", b"\x89HDF\r\n\x1a\n"),
            *(b"SQLite format 3\0\x10\0", b"%PDF-1.7\n", b"\xff\xfe{\0}\0", b"\x80\x04\x95"),
            *(b"<html><body>404</body></html>", b"version https://git-lfs.github.com/spec/v1\n"),
        )
    )
    return head + rng.randbytes(rng.choice((0, 0, 50, 5000)))


def _block(rng, data):
    at = rng.randrange(len(data))
    return at, min(rng.choice((1, 2, 8, 64, 512, 4096)), len(data) - at)


def of_json(rng, data):
    """Replace, drop, double or nest values of a JSON document; write it in other ways."""
    document = json.loads(data)
    places = list(_places(document))
    for _ in range(rng.choice((1, 1, 2, 5))):
        holder, key = rng.choice(places)
        how = rng.randrange(5)
        if how == 0 or (isinstance(holder, list) and key >= len(holder)):
            holder.clear()
        elif how == 1:
            del holder[key]
        elif how == 2 and isinstance(holder, list):
            holder += [holder[key]] * rng.choice((1, 100))
        elif isinstance(holder, dict) and key not in holder:
            continue
        else:
            holder[key] = rng.choice(VALUES)
        places = list(_places(document)) or [([0], 0)]
    text = json.dumps(document)
    how = rng.randrange(10)
    if how == 0:
        depth = rng.choice((500, 5000, 200_000))
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        text = text.replace(":", f':{opening * depth}1{closing * depth},"z":', 1)
    elif how == 1:
        text = text.replace(":", f':{"9" * rng.choice((30, 400, 5000))},"z":', 1)
    elif how == 2:
        text = text[:-1] + ',"' + rng.choice(("features", "cells", "type")) + '":null}'
    elif how == 3:
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le")))
    return text.encode()


def _places(document):
    """Yield every (holder, key) of a document, at most a few hundred from its beginning."""
    waiting, count = [document], 0
    while waiting and count < 400:
        holder = waiting.pop(0)
        keys = range(len(holder)) if isinstance(holder, list) else list(holder)
        for key in keys:
            count += 1
            yield holder, key
            if isinstance(holder[key], list | dict):
                waiting.append(holder[key])


def of_table(rng, data):
    """Replace fields of a CSV or TSV, break quotes, lines, columns or the encoding."""
    text = data.decode()
    separator = "\t" if text.count("\t") > text.count(",") else ","
    rows = [line.split(separator) for line in text.splitlines()]
    words = ("", "x", "NaN", "-1", "1e400", "inf", '"', "'", "9" * 400, "0x1F", "\0", "1,5", "é")
    words += ("1e308", "-9223372036854775809", "\ud83d\ude00", "\x1b[31m", "true", "null", "1_000")
    for _ in range(rng.choice((1, 1, 3, 30))):
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = rng.choice(words)
    how = rng.randrange(12)
    if how == 0:
        rows.insert(rng.randrange(len(rows)), rng.choice(rows)[: rng.randrange(3)])
    elif how == 1:
        rng.choice(rows).extend(["7"] * rng.choice((1, 200)))
    elif how == 2:
        rows.pop(0)
    elif how == 3:
        rows += rows
    elif how == 4:
        column = rng.randrange(len(rows[-1]))
        rows = [[value for i, value in enumerate(row) if i != column] for row in rows]
    elif how == 5:
        rows = [row[::-1] for row in rows]
    elif how == 6:
        rows[0] = [rng.choice(rows[0])] * len(rows[0])
    end = rng.choice(("\n", "\n", "\n", "\r\n", "\r", "\n\n", ""))
    joined = end.join(rng.choice((separator,) * 6 + (";",)).join(row) for row in rows) + end
    encoding = rng.choice(("utf-8",) * 6 + ("utf-16", "latin-1", "utf-8-sig"))
    return joined.encode(encoding, "replace")


def of_yaml(rng, data):
    """Give keys values that YAML allows and nobody means; or break the document."""
    lines = data.decode().splitlines()
    values = (
        *("null", "~", ".nan", ".inf", "-.inf", "1e400", "[]", "{}", "[1, [2]]", "{a: 1}", "''"),
        *("2026-01-01", "0o17", "0x1F", "1_000", "yes", "!!binary aGVsbG8=", "!!set {a}", "12:30"),
        *("!!python/object/apply:os.getcwd []", "!!python/name:os.system", "&a [*a]", "*none"),
        *("9" * 5000, "-1", "1.5", '"\\0"', '"\\u001b[31m"', "|\n  text\n  text", ">-\n  a", "? b"),
        *("2" * 300, "!!int x", "!!float 1", "!unknown x", "'", '"', "[", "{", "@x", "`x", "%x"),
    )
    for _ in range(rng.choice((1, 1, 3))):
        number = rng.randrange(len(lines))
        key = lines[number].partition(":")[0]
        how = rng.randrange(8)
        if how == 0:
            lines.insert(number, lines[number])
        elif how == 1:
            lines[number] = "\t" + lines[number]
        elif how == 2:
            lines[number] = f"{rng.choice(('nokey', '1', 'null', '[a, b]', '? [a]', '<<'))}: {key}"
        else:
            lines[number] = f"{key}: {rng.choice(values)}"
    text = "\n".join(lines) + "\n"
    how = rng.randrange(12)
    if how == 0:
        names = [chr(97 + level) for level in range(12)]
        levels = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
        for name, below in zip(names[1:], names, strict=False):
            levels.append(f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]")
        text = "\n".join(levels) + "\n" + text
    elif how == 1:
        depth = rng.choice((300, 3000, 50_000))
        text += f"workers: {'[' * depth}{']' * depth}\n"
    elif how == 2:
        text = "---\n" + text + "---\n" + text
    elif how == 3:
        return text.encode(rng.choice(("utf-16", "latin-1", "utf-8-sig")), "replace")
    return text.encode()


def of_hdf5(rng, data):
    """Replace objects of an HDF5 file by other kinds, shapes and types, links and giants."""
    stream = io.BytesIO(data)
    with h5py.File(stream, "r+") as file:
        for _ in range(rng.choice((1, 1, 2, 4))):
            names = []
            file.visit(names.append)
            if not names:
                break
            name = rng.choice(names)
            try:
                _replace(rng, file, name, rng.choice(names))
            except (ValueError, TypeError, KeyError, OSError, RuntimeError):
                continue  # this object does not allow it
    return stream.getvalue()


def _replace(rng, file, name, other):
    """Replace one object of an HDF5 file."""
    old = file.get(name)
    attrs = {} if old is None else dict(old.attrs)
    if attrs and rng.random() < 0.1:
        old.attrs[rng.choice(list(attrs))] = rng.choice(("x", 5, [1, 2], b"\xff", "csr_matrix"))
        return
    values = old[()] if isinstance(old, h5py.Dataset) and old.size < 10**6 else np.zeros(3)
    del file[name]
    rng.choice((_as_link, _as_giant, _as_other_type, _as_other_kind, _resized, _wild))(
        rng, file, name, (values, other)
    )
    if file.get(name) is not None and rng.random() < 0.7:
        for key, value in attrs.items():
            file[name].attrs[key] = value


def _as_link(rng, file, name, pair):
    """Put a link there: to another object, in a circle, or to another file."""
    other = h5py.ExternalLink(rng.choice(("/etc/hostname", "none.h5", "")), "/x")
    file[name] = rng.choice((h5py.SoftLink(f"/{pair[1]}"), h5py.SoftLink(f"/{name}"), other))


def _as_giant(rng, file, name, _pair):
    """Declare an array that no machine holds."""
    shape = rng.choice(((2**40,), (2**31, 2**20), (2**33, 2), (2**62,)))
    file.create_dataset(name, shape, rng.choice(("f8", "i4", "S9")), chunks=True)


def _as_other_type(rng, file, name, pair):
    """Put an array of the same shape and another type there."""
    dtype = rng.choice(("S3", "f2", "c8", "u1", "?", h5py.string_dtype(), "V4"))
    file.create_dataset(name, np.shape(pair[0]), dtype)


def _as_other_kind(rng, file, name, pair):
    """Put a group, a table, nothing, a number or a text there."""
    table = np.zeros(np.shape(pair[0])[:1] or 3, [("n", "i4"), ("m", "f8", 2)])
    new = rng.choice((table, h5py.Empty("f8"), 5, "text", np.float64("nan"), None))
    if new is None:
        file.create_group(name)
    else:
        file[name] = new


def _resized(rng, file, name, pair):
    """Make an array longer or shorter."""
    size = np.size(pair[0])
    file[name] = np.resize(pair[0], rng.choice((0, 1, size + 7, 3 * size)))


def _wild(rng, file, name, pair):
    """Set one number to one that is out of range."""
    values = np.array(pair[0]).reshape(-1)
    wild = rng.choice((-1, -(2**31), 2**31, 2**40, 10**18))
    if values.dtype.kind in "iu":
        values = values.astype(np.int64)
    values[rng.randrange(values.size)] = np.nan if values.dtype.kind == "f" else wild
    file[name] = values.reshape(np.shape(pair[0]))


def of_parquet(rng, data):
    """Drop, rename, retype or empty columns of a Parquet file, or its metadata."""
    table = pq.read_table(io.BytesIO(data))
    names, number = table.column_names, rng.randrange(table.num_columns)
    column, rows = table.column(number), len(table)
    others = (
        *(pa.nulls(rows), pa.array([b"\xff"] * rows), pa.array(["x"] * rows)),
        *(pa.array([[1.5]] * rows), pa.array([{"a": 1}] * rows), pa.array([float("nan")] * rows)),
        *(pa.array([2**62] * rows), pa.array([True] * rows), pa.array([None, *["7"] * (rows - 1)])),
        *(pa.array(["x"] * rows).dictionary_encode(), pa.array([10**6] * rows, pa.date32())),
    )
    how = rng.randrange(8)
    if how == 0:
        table = table.remove_column(number)
    elif how == 1:
        table = table.rename_columns([rng.choice(names) for _ in names])
    elif how == 2:
        table = table.slice(0, rng.choice((0, 1)))
    elif how == 3:
        table = table.append_column(names[number], column)
    elif how == 4 and table.schema.metadata:
        text = b"\0".join(table.schema.metadata.values())
        broken = rng.choice((b"{}", b"[]", b"null", b"5", flipped(rng, text), b'{"a": [1'))
        table = table.replace_schema_metadata(dict.fromkeys(table.schema.metadata, broken))
    elif how == 5:
        table = table.replace_schema_metadata({})
    else:
        table = table.set_column(number, names[number], rng.choice(others))
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def of_safetensors(rng, data):
    """Change the header of a safetensors file, or the length that it claims."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.15:
        claimed = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 100_000_001))
        return struct.pack("<Q", claimed) + data[8:]
    metadata = header.get("__metadata__", {})
    nested = [key for key, text in metadata.items() if text[:1] in "[{"]
    if nested and rng.random() < 0.5:
        key = rng.choice(nested)
        metadata[key] = of_json(rng, metadata[key].encode()).decode("utf-8", "replace")
    elif metadata and rng.random() < 0.4:
        metadata[rng.choice(list(metadata))] = rng.choice(("", "x", "null", "-1", "1e400", "[]"))
    else:
        tensors = [key for key in header if key != "__metadata__"]
        name = rng.choice(tensors)
        field = rng.choice(("dtype", "shape", "data_offsets"))
        values = ("F16", "F64", "I64", "BOOL", "F8_E4M3", [], [0], [-1], [2**60], [1, 2**40])
        header[name][field] = rng.choice((*values, [0, 2**62], [1, 0], None, header[name][field]))
        if rng.random() < 0.3:
            header[rng.choice(tensors)] = header.pop(name, {})
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def of_gzip(rng, data):
    """Cut or double a gzip member, falsify its sums, or make a bomb of it."""
    how = rng.randrange(6)
    if how == 0:
        return data[: rng.randrange(10, len(data))]
    if how == 1:
        return data + data
    if how == 2:
        return data + rng.choice((b"\0" * 100, b"junk", GZIP, data[:20]))
    if how == 3:
        return data[:-8] + rng.randbytes(8)
    if how == 4:
        return gzip.compress(data)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    text = gzip.decompress(data)
    piece = rng.choice((b"\0", b" ", b"1", text))
    block = piece * (2**22 // len(piece))
    parts = [packer.compress(text), *(packer.compress(block) for _ in range(rng.choice((64, 600))))]
    return b"".join([*parts, packer.flush()])


OF_BYTES = (flipped, flipped_ends, cut, zeroed, swapped, repeated, inserted, foreign)
OF_ENDS = {
    ".json": of_json,
    ".geojson": of_json,
    ".xenium": of_json,
    ".csv": of_table,
    ".tsv": of_table,
    ".mtx": of_table,
    ".yaml": of_yaml,
    ".h5": of_hdf5,
    ".h5ad": of_hdf5,
    ".parquet": of_parquet,
    ".safetensors": of_safetensors,
}


def mutate(rng, name, data):
    """Return mutated bytes of a file, and the name of what was done.

    Args:
        rng: The random generator.
        name: The file's name, whose ending says what it holds.
        data: Its bytes.
    """
    path = Path(name)
    if path.suffix == ".gz" and rng.random() < 0.6:
        text, done = mutate(rng, path.stem, gzip.decompress(data))
        return gzip.compress(text), f"{done} in gzip"
    if path.suffix == ".snappy" and rng.random() < 0.5:
        length, shift = 0, 0
        for byte in data:
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        text = pa.decompress(data, length, "snappy", asbytes=True)
        text, done = mutate(rng, path.stem, text)
        return pa.compress(text, "snappy", asbytes=True), f"{done} in snappy"
    special = of_gzip if path.suffix == ".gz" else OF_ENDS.get(path.suffix)
    if special is not None and rng.random() < 0.6:
        return special(rng, data), special.__name__
    mutator = rng.choice(OF_BYTES)
    return mutator(rng, data), mutator.__name__


def make_mutant(intact, folder, seed):
    """Write a copy of an input with one file mutated; return that file and what was done."""
    rng = random.Random(f"{intact.name} {seed}")
    shutil.copytree(intact.folder, folder)
    path = folder / rng.choice(intact.files)
    data, done = mutate(rng, path.name, path.read_bytes())
    path.write_bytes(data)
    return path, done
