"""Alter one file of a run, and compare what readers then make of the run with what they made of it.

A fault is silent if a reader returns something else and says nothing of the file.
"""

import json
import logging
import random
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from scellst_ray.core.logs import one_line
from scellst_ray.runs import documents
from scellst_ray.runs.folder import RUN_FILE
from tests.faults.judge import LINE, judge_message
from tests.faults.whole_run import READINGS

SAME, TOLD, SILENT = "as before", "told", "silent"
# Files by what they are, as patterns within the run folder.
KINDS = {
    "run.json": "run.json",
    "slides.json": "slides.json",
    "config.yaml": "config.yaml",
    "summary.json": "summary.json",
    "lease.json": "lease.json",
    "record": "records/*.json",
    "receipts log": "receipts/*.parquet",
    "shard": "shards/*.parquet",
    "cells": "cells/*.parquet",
    "expression": "expression/*.parquet",
    "failures": "failures/*.parquet",
    "crops index": "crops/crops.json",
    "crops": "crops/*/*.parquet",
    "head": "head.safetensors",
}


@dataclass(frozen=True)
class Answer:
    """What a reader made of an altered run.

    Attributes:
        kind: Key of `KINDS`.
        alteration: Key of `ALTERATIONS`.
        file: The altered file, within the folder.
        reading: Key of `READINGS`.
        outcome: `SAME`, `TOLD`, `SILENT`, or how an error is no line for people.
        text: The error or warning.
    """

    kind: str
    alteration: str
    file: str
    reading: str
    outcome: str
    text: str = ""

    @property
    def is_good(self):
        return self.outcome in (SAME, TOLD)

    def rank(self):
        """Return how bad it is: unchanged, reported, without a line, silent."""
        return {SAME: 0, TOLD: 1, SILENT: 3}.get(self.outcome, 2)


def flip(rng, data, _path):
    """Flip one bit."""
    data = bytearray(data)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def flip_digit(rng, data, path):
    """Make another digit of a digit of a text, so that the text stays sound; else flip a bit."""
    places = [i for i, byte in enumerate(data) if 48 <= byte < 58]
    if path.suffix == ".parquet" or not places:
        return flip(rng, data, path)
    at = rng.choice(places)
    bits = [bit for bit in (1, 2, 4, 8) if 48 <= data[at] ^ bit < 58]
    return data[:at] + bytes([data[at] ^ rng.choice(bits)]) + data[at + 1 :]


def cut(rng, data, _path):
    """Lose the end."""
    return data[: rng.randrange(1, len(data))]


def empty(_rng, _data, _path):
    """Leave nothing."""
    return b""


def zero(rng, data, _path):
    """Lose a block, which reads as zeros."""
    at = rng.randrange(len(data))
    block = data[at : at + 512]
    return data[:at] + b"\0" * len(block) + data[at + 512 :]


def other_json(rng, _data, _path):
    """Put JSON of another kind there."""
    return json.dumps(rng.choice(([], {}, None, 5, "x", [1], {"slide_id": 5}, {"a": {}}))).encode()


def other_value(rng, data, path):
    """Give a key of a JSON document a value of another kind, or drop the key."""
    if path.suffix != ".json":
        return flip(rng, data, path)
    document = json.loads(data)
    key = rng.choice(list(document))
    if rng.random() < 0.3:
        del document[key]
    else:
        document[key] = rng.choice((None, [], {}, 5, "x", -1, 1e300, True))
    return json.dumps(document, indent=2).encode()


def of_a_sibling(rng, data, path):
    """Put another file of its kind there, or what lies in its middle at its beginning."""
    others = [p for p in path.parent.iterdir() if p != path and p.suffix == path.suffix]
    if others and path.parent.name in ("records", "cells", "expression", "failures", "shards"):
        return rng.choice(sorted(others)).read_bytes()
    return data[len(data) // 2 :] + data[: len(data) // 2]


ALTERATIONS = {
    "one bit flipped": flip,
    "one digit changed": flip_digit,
    "cut": cut,
    "emptied": empty,
    "a block of zeros": zero,
    "other JSON": other_json,
    "a value of another kind": other_value,
    "another file's content": of_a_sibling,
}


class _Warnings(logging.Handler):
    """What was logged as a warning or worse."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@contextmanager
def warnings_told():
    """Yield the texts of the warnings of the product, as if a process began here."""
    documents._warned.cache_clear()
    handler, logger = _Warnings(), logging.getLogger("scellst_ray")
    logger.addHandler(handler)
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)


def readings_of(uri, names=READINGS):
    """Return what every reader makes of an intact run."""
    return {name: READINGS[name](str(uri)) for name in names}


def judge_altered(run, expected, place, kind, alteration, seed):
    """Alter one file of a copy of a run; return the answer of every reader.

    Args:
        run: Folder of the intact run.
        expected: What `readings_of` returned for it.
        place: Folder of the copy; removed at the end.
        kind: Key of `KINDS`.
        alteration: Key of `ALTERATIONS`.
        seed: Seed of the alteration.
    """
    rng = random.Random(f"{kind} {alteration} {seed}")
    shutil.copytree(run, place)
    path = rng.choice(sorted(Path(place).glob(KINDS[kind])))
    before = path.read_bytes()
    altered = ALTERATIONS[alteration](rng, before, path)
    path.write_bytes(altered)
    name = str(path.relative_to(place))
    answers = []
    for reading, wanted in expected.items():
        outcome, text = _read(reading, place, path, wanted)
        answers.append(Answer(kind, alteration, name, reading, outcome, text))
        path.write_bytes(altered)
    shutil.rmtree(place)
    return answers if altered != before else []


def _read(reading, place, path, wanted):
    """Return the outcome of one reading, and its text."""
    # A table may be named by its slide: a shard's damage is told of the slide or of the tiles.
    names = [path.name, path.stem, *([place.name] if path.name == RUN_FILE else [])]
    with warnings_told() as texts:
        try:
            found = READINGS[reading](str(place))
        except (ValueError, OSError) as error:
            outcome, text = judge_message(one_line(str(error)), names)
            return (TOLD if outcome == LINE else outcome), text
        except Exception as error:  # noqa: BLE001 - a traceback is what is looked for
            return f"traceback {type(error).__name__}", str(error)[:500]
    if is_equal(found, wanted):
        return SAME, ""
    told = [text for text in texts if judge_message(one_line(text), names)[0] == LINE]
    return (TOLD, told[0]) if told else (SILENT, describe(found, wanted))


def is_equal(found, wanted):
    """Return whether two results are equal; tables by content."""
    if isinstance(wanted, pa.Table):
        return isinstance(found, pa.Table) and found.equals(wanted)
    if isinstance(wanted, list | tuple):
        return (
            isinstance(found, list | tuple)
            and len(found) == len(wanted)
            and all(map(is_equal, found, wanted))
        )
    return bool(found == wanted)


def describe(found, wanted):
    """Return where two results differ, in short."""
    if isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        if len(found) != len(wanted):
            return f"{len(found)} parts, not {len(wanted)}"
        pairs = zip(found, wanted, strict=True)
        return next(describe(one, other) for one, other in pairs if not is_equal(one, other))
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = [key for key in wanted | found if found.get(key) != wanted.get(key)]
        return ", ".join(f"{key}: {found.get(key)!r}, not {wanted.get(key)!r}" for key in keys)
    return f"{str(found)[:100]!r}, not {str(wanted)[:100]!r}"
