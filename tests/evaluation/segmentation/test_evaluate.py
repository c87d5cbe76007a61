"""`scellst-ray evaluate segmentation`: pairs of files, printed tables and written files."""

import json

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import shapely

from scellst_ray import storage
from scellst_ray.commands.cli import main
from scellst_ray.core import schemas
from scellst_ray.core.geometry import Frame
from scellst_ray.evaluation.segmentation.config import EvaluateSegmentationConfig
from scellst_ray.evaluation.segmentation.evaluate import evaluate_segmentation
from scellst_ray.nuclei.instances import nuclei_from_labels
from scellst_ray.runs.folder import RunFolder
from tests.support.paths import SHARED

MPP = 0.25
ONE = Frame(0, 0, 1, 1)
COMMAND = ["evaluate", "segmentation"]


def discs(places, radius=6, size=120):
    """Return a label map of discs around (x, y), in px, numbered in order."""
    y, x = np.mgrid[:size, :size] + 0.5
    labels = np.zeros((size, size), np.uint16)
    for number, (left, top) in enumerate(places, start=1):
        labels[(x - left) ** 2 + (y - top) ** 2 <= radius**2] = number
    return labels


PLACES = [(20, 20), (50, 22), (90, 30), (30, 80), (70, 75), (100, 100)]
TYPES = ["tumour", "tumour", "lymphocyte", "lymphocyte", "stroma", "tumour"]


def cells_table(labels, names, frame=ONE, slide_id="s"):
    """Return the nuclei of a label map as CELLS; `names` are by label."""
    nuclei = nuclei_from_labels(labels)
    at = nuclei.centroid_px.astype(int)
    number = len(nuclei)
    x0y0 = frame.to_level0(nuclei.centroid_px)
    columns = {
        "slide_id": pa.repeat(slide_id, number),
        "cell_id": pa.array(range(number), pa.int64()),
        "x0": pa.array(x0y0[:, 0].astype(np.float32)),
        "y0": pa.array(x0y0[:, 1].astype(np.float32)),
        "area_um2": pa.array((nuclei.area_px * MPP**2).astype(np.float32)),
        "nucleus_type": pa.array([names[labels[y, x] - 1] for x, y in at], pa.string()),
        "type_prob": pa.nulls(number, pa.float32()),
        "polygon": pa.array(nuclei.polygon_wkb(frame), pa.binary()),
    }
    return pa.table(columns)


def write_cells(uri, table, digest=""):
    storage.publish_table(
        str(uri),
        schemas.conform(table, schemas.cells_schema(None, with_bbox=False), "CELLS", digest),
    )


def write_points(path, places, types=None):
    lines = ["x,y,type"] if types else ["x,y"]
    names = types or [None] * len(places)
    lines += [f"{x},{y},{t}" if t else f"{x},{y}" for (x, y), t in zip(places, names, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Return a folder with an annotation of six nuclei in all formats, and CELLS that equal it."""
    np.save(tmp_path / "truth.npy", discs(PLACES))
    rows = [f"{number},{name}" for number, name in enumerate(TYPES, start=1)]
    (tmp_path / "types.csv").write_text("\n".join(["label,type", *rows]) + "\n")
    write_points(tmp_path / "truth.csv", PLACES, TYPES)
    write_cells(tmp_path / "cells.parquet", cells_table(discs(PLACES), TYPES))
    return tmp_path


def config(folder, **changes):
    values = {"truth": "truth.npy", "predicted": "cells.parquet", "mpp": MPP} | changes
    for name in ("truth", "predicted", "truth_types", "run", "manifest", "out"):
        if values.get(name):
            values[name] = str(folder / values[name])
    return EvaluateSegmentationConfig(**{k: v for k, v in values.items() if v is not None})


@pytest.mark.parametrize(
    "changes",
    [{"truth_types": "types.csv"}, {"truth": "truth.csv"}, {"radius_um": 0.1}, {"mpp": None}],
)
def test_what_is_right_is_perfect(files, changes):
    found = evaluate_segmentation(config(files, **changes))
    assert list(found.images) == [str(files / changes.get("truth", "truth.npy"))]
    if "mpp" in changes:
        assert found.all.centroids is None
    else:
        assert found.all.centroids.f1 == 1
        assert found.all.centroids.num_true == 6
    assert (found.all.masks is None) == ("truth" in changes)
    if found.all.masks:
        assert found.all.masks.pq == found.all.masks.aji == 1
    assert found.typed == bool({"truth_types", "truth"} & {*changes})
    if found.typed:
        assert {name: counts.f1 for name, counts in found.all.types.items()} == dict.fromkeys(
            TYPES, 1
        )
    assert found.notes == []


def test_an_annotation_of_a_region_at_another_resolution(files):
    # Annotated on an image of 0.5 um/px that begins at (1000, 2000) of the slide.
    frame = Frame(1000, 2000, 2, 2)
    write_cells(files / "slide.parquet", cells_table(discs(PLACES), TYPES, frame))
    elsewhere = cells_table(discs([(10, 10)]), ["tumour"])
    both = pa.concat_tables(
        [cells_table(discs(PLACES), TYPES, frame), elsewhere], promote_options="none"
    )
    write_cells(files / "slide.parquet", both)
    settings = {"predicted": "slide.parquet", "truth_mpp": 0.5, "region": "1000,2000"}
    found = evaluate_segmentation(config(files, **settings))
    assert found.all.masks.pq == 1
    assert found.all.centroids.f1 == 1
    # Without a region, the size of the annotated part of points is unknown.
    settings["truth"] = "truth.csv"
    assert evaluate_segmentation(config(files, **settings)).all.centroids.num_predicted == 7
    settings["region"] = "1000 2000 240 240"
    assert evaluate_segmentation(config(files, **settings)).all.centroids.f1 == 1
    settings["region"] = "1000,2000,120,240"  # the left half
    half = evaluate_segmentation(config(files, **settings)).all.centroids
    assert (half.num_true, half.num_predicted, half.num_matched) == (3, 3, 3)


def test_names_that_mean_the_same(files):
    names = {"tumour": "Neoplastic", "lymphocyte": "Inflammatory", "stroma": "Connective"}
    write_cells(files / "other.parquet", cells_table(discs(PLACES), [names[t] for t in TYPES]))
    settings = {"truth": "truth.csv", "predicted": "other.parquet"}
    found = evaluate_segmentation(config(files, **settings))
    assert not found.typed
    assert found.notes == [
        "types only in the annotation: lymphocyte, stroma, tumour (see --types)",
        "types only in the prediction: Connective, Inflammatory, Neoplastic (see --types)",
    ]
    settings["types"] = ["tumour=Neoplastic", " lymphocyte = Inflammatory", "stroma=", "gone=Dead"]
    found = evaluate_segmentation(config(files, **settings))
    assert found.typed
    assert found.all.types["tumour"].f1 == found.all.types["lymphocyte"].f1 == 1
    assert found.all.centroids.f1 == 1  # stroma counts there
    assert found.notes == [
        "types given in --types but not in the annotation: gone",
        "types given in --types but not in the prediction: Dead",
        "types only in the prediction: Connective (see --types)",
    ]


@pytest.fixture
def run(tmp_path):
    """Return a run of slides a (right), b (one of six missing), c (empty) and d (failed)."""
    folder = RunFolder(str(tmp_path / "run"), "0123456789abcdef")
    storage.publish_json(f"{folder.uri}/run.json", {"digest": folder.digest, "format_version": 1})
    labels = discs(PLACES)
    for slide_id, kept in (("a", labels), ("b", np.where(labels == 5, 0, labels))):
        table = cells_table(kept, TYPES, slide_id=slide_id)
        write_cells(folder.cells_uri(slide_id), table, folder.digest)
        record = {"slide_id": slide_id, "status": "done", "mpp": MPP, "tables": ["CELLS"]}
        storage.publish_json(folder.record_uri(slide_id), record)
    record = {"slide_id": "c", "status": "empty", "mpp": MPP, "tables": []}
    storage.publish_json(folder.record_uri("c"), record)
    record = {"slide_id": "d", "status": "failed", "mpp": None, "tables": [], "error": "cut"}
    storage.publish_json(folder.record_uri("d"), record)
    return folder


def test_a_slide_of_a_run_knows_its_resolution(files, run):
    del run
    found = evaluate_segmentation(config(files, predicted=None, mpp=None, run="run", slide="b"))
    assert list(found.images) == ["b"]
    assert found.all.centroids.recall == found.all.masks.recall == 5 / 6
    with pytest.raises(ValueError, match="slide 'd' failed at None with None: cut"):
        evaluate_segmentation(config(files, predicted=None, run="run", slide="d"))
    with pytest.raises(ValueError, match="slides with a record: 1 of 1 not found, such as 'e'"):
        evaluate_segmentation(config(files, predicted=None, run="run", slide="e"))


def test_many_slides_from_the_shell(files, run, capsys):
    del run
    (files / "m.csv").write_text(
        "slide_id,truth,predicted,mpp,truth_types,region\n"
        "a,truth.csv,,,,\n"
        "b,truth.npy,,,types.csv,\n"
        "c,truth.csv,,,,\n"
        'x,truth.csv,cells.parquet,0.25,,"0,0,120,120"\n'
    )
    arguments = ["--manifest", str(files / "m.csv"), "--run", str(files / "run")]
    assert main([*COMMAND, *arguments, "--out", str(files / "scores.json")]) == 0
    shown = capsys.readouterr().out
    assert "masks, IoU above 0.5" in shown
    assert "centroids within 3 um" in shown
    assert "stroma" in shown
    assert f"wrote {files}/scores.json" in shown
    assert max(len(line) for line in shown.splitlines() if "wrote" not in line) <= 80
    scores = json.loads((files / "scores.json").read_text())
    assert list(scores["images"]) == ["a", "b", "c", "x"]
    assert "masks" not in scores["images"]["a"]
    assert scores["images"]["b"]["masks"]["num_matched"] == 5
    assert scores["images"]["c"]["centroids"]["precision"] is None
    assert scores["all"]["centroids"]["num_true"] == 24
    assert scores["all"]["centroids"]["recall"] == 17 / 24
    assert scores["all"]["types"]["stroma"]["f1"] == 2 * 2 / (2 * 2 + 2)
    assert scores["config"]["radius_um"] == 3
    assert main([*COMMAND, *arguments, "--out", str(files / "scores.csv")]) == 0
    table = pl.read_csv(files / "scores.csv")
    assert table["slide_id"].to_list() == ["a", "b", "c", "x", "all"]
    assert table["masks.f1"].to_list() == [None, 10 / 11, None, None, 10 / 11]
    assert table["types.stroma.f1"][-1] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,thruth\na,truth.csv\n", r"column truth not found; .*did you mean 'thruth'"),
        ("slide_id,truth\n", r"m.csv: has no rows"),
        ("slide_id,truth,predicted\na,truth.csv,\n", "row 1: slide 'a' has no predicted; give one"),
        ("slide_id,truth,predicted\na,,p.npy\n", "row 1: slide 'a' has no truth"),
        ("slide_id,truth,predicted\na,t,p\na,t,p\n", "row 2: slide_id 'a' is empty or given twice"),
        ("slide_id,truth,predicted\na,gone.npy,p.npy\n", r"gone.npy: no such file"),
        (
            "slide_id,truth,predicted,truth_mpp\na,truth.csv,cells.parquet,0.5\n",
            "a: with truth_mpp, mpp .* is needed too",
        ),
        (
            "slide_id,truth,predicted,mpp\na,truth.csv,cells.parquet,-1\n",
            "a: mpp is '-1'; expected a positive number",
        ),
        (
            "slide_id,truth,predicted,region\na,truth.csv,cells.parquet,5\n",
            "region is '5'; expected X0,Y0 or X0,Y0,W0,H0",
        ),
        ("slide_id,truth,predicted\na,truth.csv,cells.parquet\n", "to match points in um, give"),
    ],
)
def test_manifests_that_cannot_be_used(files, text, message):
    (files / "m.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate_segmentation(config(files, truth=None, predicted=None, mpp=None, manifest="m.csv"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truth": None}, "give either truth"),
        ({"manifest": "m.csv"}, "give either truth"),
        ({"run": "r"}, "give either predicted or run"),
        ({"predicted": None}, "nothing to score: give predicted, or run"),
        ({"predicted": None, "run": "r"}, "truth of a run needs slide"),
        ({"slide": "a"}, "truth of a run needs slide"),
        ({"radius_um": 0.0}, "radius_um is 0.0"),
        ({"out": "a.txt"}, r"a.txt; it must end in .json or .csv"),
        ({"types": ["a"]}, "types has 'a'; expected annotated=predicted"),
        ({"types": ["=a"]}, "types has '='"),
        ({"region": "1,2,3"}, "region is '1,2,3'"),
    ],
)
def test_settings_that_say_too_little_or_too_much(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_errors_are_one_line_on_the_command_line(files, capsys):
    np.save(files / "small.npy", discs(PLACES, size=110))
    arguments = ["--truth", f"{files}/truth.npy", "--predicted", f"{files}/small.npy"]
    assert main([*COMMAND, *arguments]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {files}/small.npy is (110, 110) px and {files}/truth.npy")
    assert shown.count("\n") == 1


@pytest.fixture(scope="module")
def types_crc():
    folder = SHARED / "data" / "types_crc"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}")
    return folder


def test_real_points_against_themselves_with_faults_put_in(types_crc, tmp_path):
    truth = pl.read_csv(types_crc / "img20.csv")
    labelled = truth.filter(pl.col("type") != "unlabelled")
    swapped = {"epithelial": "fibroblast", "fibroblast": "epithelial"}
    predicted = truth.with_columns(
        pl.col("x") + 1.0,  # 0.55 um: still the same nucleus
        pl.when(pl.int_range(pl.len()) % 4 == 0)
        .then(pl.col("type").replace(swapped))
        .otherwise(pl.col("type")),
    )
    predicted.write_csv(tmp_path / "predicted.csv")
    found = evaluate_segmentation(
        EvaluateSegmentationConfig(
            truth=str(types_crc / "img20.csv"),
            predicted=str(tmp_path / "predicted.csv"),
            mpp=0.55,
            types=["unlabelled="],
        )
    )
    assert found.all.centroids.num_matched == len(truth)
    right = truth["type"] == predicted["type"]
    for name, counts in found.all.types.items():
        if name == "unlabelled":
            continue
        both = int(((truth["type"] == name) & right).sum())
        assert counts.num_true == int((labelled["type"] == name).sum())
        assert counts.both == pytest.approx(both, abs=2)  # neighbours less than 2 px apart


def test_real_masks_against_a_shifted_copy(tmp_path):
    folder = SHARED / "data" / "seg_monuseg" / "labels"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}")
    path = sorted(folder.iterdir())[0]
    found = evaluate_segmentation(
        EvaluateSegmentationConfig(truth=str(path), predicted=str(path), mpp=0.25)
    )
    number = found.all.masks.num_true
    assert number > 300
    assert found.all.masks.pq == found.all.centroids.f1 == 1
    # As CELLS of another resolution, nuclei lose only holes and second parts.
    from scellst_ray.evaluation.segmentation.annotations import read_nuclei

    labels = read_nuclei(str(path)).labels_HW
    table = cells_table(labels, ["nucleus"] * number, Frame(0, 0, 0.5, 0.5))
    assert shapely.is_valid(shapely.from_wkb(table["polygon"].to_pylist())).all()
    write_cells(tmp_path / "cells.parquet", table)
    found = evaluate_segmentation(
        EvaluateSegmentationConfig(
            truth=str(path), predicted=f"{tmp_path}/cells.parquet", mpp=0.5, truth_mpp=0.25
        )
    )
    assert found.all.masks.num_matched >= number - 2
    assert found.all.masks.pq > 0.99
