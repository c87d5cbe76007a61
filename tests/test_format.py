"""FORMAT.md is true: its examples have the columns of the schemas and the keys of the types."""

import csv
import io
import json
import re
import typing
from pathlib import Path

import pyarrow as pa
import pytest
import shapely

import scellst_ray
from scellst_ray.core import schemas
from scellst_ray.runs.identity import StoredIdentity
from scellst_ray.runs.records import (
    CropIndex,
    LeaseInfo,
    RunInfo,
    SlideCrops,
    SlideRecord,
    SlideSource,
)
from scellst_ray.runs.scores import ScoredSlide, ScoredType, ScoresInfo, StoredAccuracy
from scellst_ray.slides.manifest import read_manifest

TEXT = (Path(scellst_ray.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
# Vectors are cut to this length in the examples.
DIM = 3
EXPRESSION = schemas.expression_schema(DIM, with_distance=True)
TABLES = {
    "CELLS": schemas.cells_schema(DIM),
    "EXPRESSION": EXPRESSION,
    "PROFILES": schemas.PROFILES,
    "SCORES": schemas.scores_schema(["score_T_cells", "score_tumour"]),
    "DIFFERENTIAL_GENES": schemas.DIFFERENTIAL_GENES,
    "AGREEMENT": schemas.AGREEMENT,
    "LAST_LAYER": schemas.last_layer_schema(DIM),
    "CROPS": schemas.CROPS,
    "FAILURES": schemas.FAILURES,
    "RECEIPTS": schemas.RECEIPTS,
    "TILES": schemas.TILES,
    "Shards": pa.schema(schemas.SHARD_FIELDS),
    "BAGS": schemas.bags_schema(DIM, with_counts=True),
}
DOCUMENTS = {
    "`run.json`": RunInfo,
    "`lease.json`": LeaseInfo,
    "`crops.json`": CropIndex,
    "a record": SlideRecord,
    "`scores.json`": ScoresInfo,
}


def section(title):
    """Return the text of a section, up to the next heading of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}$", TEXT, re.MULTILINE)
    rest = TEXT[found.end() :]
    following = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: following.start()] if following else rest


def example_after(line, text=TEXT):
    """Return the JSON that stands in a block after a line."""
    found = re.search(rf"^{re.escape(line)}\n\n```json\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    return json.loads(found[1])


def keys_of(kind):
    """Return the required keys and all keys of a TypedDict."""
    return kind.__required_keys__, set(typing.get_type_hints(kind))


@pytest.mark.parametrize("name", TABLES)
def test_an_example_row_is_one_of_its_schema(name):
    schema = TABLES[name]
    row = example_after("Example row:", section(name))
    assert list(row) == schema.names
    for field in schema:
        if field.type == pa.binary():
            row[field.name] = bytes.fromhex(row[field.name])
        assert field.nullable or row[field.name] is not None
    table = pa.Table.from_pylist([row], schema=schema)
    assert len(schemas.conform(table, schema, name)) == 1
    if "polygon" in row:
        outline = shapely.from_wkb(row["polygon"])
        assert outline.is_valid
        box = outline.bounds
        assert box[0] <= row["x0"] <= box[2]
        assert box[1] <= row["y0"] <= box[3]


@pytest.mark.parametrize("name", TABLES)
def test_every_column_is_described(name):
    text = section(name)
    if name == "Shards":
        text += section("CELLS")
    if name == "TILES":
        text += section("RECEIPTS")
    missing = {
        column
        for column in TABLES[name].names
        if not column.startswith("seconds_") and not re.search(rf"[` ]{column}[` ]", text)
    }
    assert missing == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_an_example_of_json_has_the_keys_of_its_type(name):
    required, known = keys_of(DOCUMENTS[name])
    assert required <= set(example_after(f"Example of {name}:")) <= known


def test_nested_examples():
    assert set(example_after("Example of `run.json`:")["identity"]) <= keys_of(StoredIdentity)[1]
    (source,) = example_after("Example of `slides.json`:").values()
    assert keys_of(SlideSource)[0] <= set(source) <= keys_of(SlideSource)[1]
    scores = example_after("Example of `scores.json`:")
    assert set(scores["agreement"]) == keys_of(StoredAccuracy)[1]
    for found, kind in ((scores["types"], ScoredType), (scores["slides"].values(), ScoredSlide)):
        assert all(set(each) == keys_of(kind)[1] for each in found)
    (crops,) = example_after("Example of `crops.json`:")["slides"].values()
    assert set(crops) == keys_of(SlideCrops)[1]


def test_every_key_of_a_record_is_described():
    described = set(re.findall(r"`(\w+)`", section("Slide record")))
    # It is never stored.
    assert keys_of(SlideRecord)[1] - described == {"num_crops", "damaged_shards"}


def test_the_example_manifest_is_one(tmp_path):
    found = re.search(r"```csv\n(.*?)```", section("Input: MANIFEST"), re.DOTALL)
    (tmp_path / "manifest.csv").write_text(found[1])
    (row,) = read_manifest(str(tmp_path / "manifest.csv"))
    (expected,) = csv.DictReader(io.StringIO(found[1]))
    assert (row.slide_id, row.uri, row.mpp) == (expected["slide_id"], expected["uri"], 0.5)
