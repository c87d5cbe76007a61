"""Export of one slide to GeoJSON, as QuPath reads detections. Memory does not grow with the slide.

Coordinates are level-0 px, and y points down, as in QuPath. GIS tools draw such a file upside down.
"""

import gzip
import io
import json
import math
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import shapely

from scellst_ray import storage
from scellst_ray.core.version import __version__
from scellst_ray.export.cell_blocks import CellBlock, cell_blocks
from scellst_ray.export.colours import colours_of, rgb_of
from scellst_ray.export.free_names import free_names
from scellst_ray.export.scored import BEST_TYPE, CellScores
from scellst_ray.runs.reading import Run
from scellst_ray.runs.records import known_mpp

COLUMNS = ("cell_id", "area_um2", "nucleus_type", "type_prob", "polygon")
# Namespace of the ids of detections: the same cell of the same run has the same id in every export.
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "scellst_ray")
# Measurements that are no genes.
TAKEN = ("area_um2", "type_prob", "distance")
# Significant digits of measurements.
DIGITS = 5
GZIP_LEVEL = 6


def write_geojson(run: Run, out: str, slide_id: str, genes: Sequence[str]) -> int:
    """Write the cells of a slide as GeoJSON; return their number.

    Each cell is a detection with its outline, class and measurements: `area_um2`, `type_prob`,
    `distance` and scores where the run has them, and a number for each gene. The best type stands
    in its metadata. Equal runs give equal bytes.

    Args:
        run: The run.
        out: Local path or fsspec URI; compressed if it ends in `.gz`.
        slide_id: The slide.
        genes: The genes to write.

    Raises:
        ValueError: the slide failed, a gene is unknown, or a table is damaged. Nothing is written.
    """
    count = 0

    def write(path: Path) -> None:
        nonlocal count
        with path.open("wb") as raw, _text(raw, is_gzip=out.endswith(".gz")) as file:
            file.write(_head(run, slide_id))
            for feature in _features(run, slide_id, genes):
                file.write(",\n" if count else "\n")
                file.write(json.dumps(feature, separators=(",", ":"), ensure_ascii=False))
                count += 1
            file.write("\n]}\n")

    storage.publish(out, write)
    return count


def _text(raw: Any, *, is_gzip: bool) -> io.TextIOWrapper:  # noqa: ANN401 - a binary file
    """Return a text file over a binary one. The header of gzip holds neither name nor time."""
    if is_gzip:
        raw = gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0)
    return io.TextIOWrapper(raw, encoding="utf-8", newline="\n")


def _head(run: Run, slide_id: str) -> str:
    about = {
        "version": __version__,
        "run_digest": run.folder.digest,
        "slide_id": slide_id,
        "mpp": known_mpp(run.records[slide_id]),
        "frame": "level-0 px, y points down",
    }
    text = json.dumps(about, ensure_ascii=False)
    return f'{{"type":"FeatureCollection","scellst_ray":{text},"features":['


def _features(run: Run, slide_id: str, genes: Sequence[str]) -> Iterator[dict[str, Any]]:
    classes: dict[str, dict[str, Any]] = {}
    scores = CellScores(run).of(slide_id)
    for block in cell_blocks(run, slide_id, COLUMNS, genes, scores):
        names = block.cells["nucleus_type"].to_pylist()
        if not classes.keys() >= set(names):
            colours = colours_of([*classes, *sorted(set(names) - classes.keys())])
            classes = {n: {"name": n, "color": rgb_of(c)} for n, c in colours.items()}
        outlines = _outlines(block.cells["polygon"])
        ids = block.cells["cell_id"].to_pylist()
        best = [None] * len(ids) if block.scores is None else block.scores[BEST_TYPE].to_pylist()
        rows = zip(ids, names, best, outlines, measurements(block, genes), strict=True)
        for cell_id, name, best_type, outline, measured in rows:
            metadata = {} if best_type is None else {"metadata": {BEST_TYPE: best_type}}
            yield {
                "type": "Feature",
                "id": str(uuid.uuid5(NAMESPACE, f"{run.folder.digest}/{slide_id}/{cell_id}")),
                "geometry": {"type": "Polygon", "coordinates": [outline]},
                "properties": {
                    "objectType": "detection",
                    "name": str(cell_id),
                    "classification": classes[name],
                    "measurements": measured,
                    **metadata,
                },
            }


def _outlines(column: pa.ChunkedArray) -> Iterator[list[list[float]]]:
    """Yield the points [x, y] of each outline, closed, exactly as stored."""
    shapes = shapely.from_wkb(column.to_numpy())
    points = shapely.get_coordinates(shapes).tolist()
    start = 0
    for count in shapely.get_num_coordinates(shapes).tolist():
        yield points[start : start + count]
        start += count


def measurements(block: CellBlock, genes: Sequence[str]) -> Iterator[dict[str, float | str]]:
    """Yield what is measured of each cell, by name; a number that is none is the text 'NaN'."""
    columns: dict[str, Sequence[Any]] = {
        "area_um2": block.cells["area_um2"].to_pylist(),
        "type_prob": block.cells["type_prob"].to_pylist(),
    }
    if block.distance_N is not None:
        columns["distance"] = block.distance_N.tolist()
    if block.scores is not None:
        columns |= {c: block.scores[c].to_pylist() for c in block.scores.column_names[1:]}
    names = free_names(genes, (*TAKEN, *columns), is_cased=True)
    columns |= {name: block.values_NG[:, i].tolist() for i, name in enumerate(names)}
    columns = {
        name: values for name, values in columns.items() if any(v is not None for v in values)
    }
    for row in zip(*columns.values(), strict=True):
        yield {n: _number(v) for n, v in zip(columns, row, strict=True) if v is not None}


def _number(value: float) -> float | str:
    return (
        float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value).replace("nan", "NaN")
    )
