"""`evaluate encoder`: chosen cells, baselines, written files, and colours of real cells."""

import json

import numpy as np
import polars as pl
import pytest
from PIL import Image

from scellst_ray import storage
from scellst_ray.commands.cli import main
from scellst_ray.commands.evaluate_encoder import tables
from scellst_ray.evaluation.encoder import evaluate as module
from scellst_ray.evaluation.encoder.config import EvaluateEncoderConfig
from scellst_ray.evaluation.encoder.evaluate import choose_cells, evaluate_encoder
from scellst_ray.evaluation.encoder.scores import probe
from scellst_ray.evaluation.encoder.typed_crops import colours, crops_of
from scellst_ray.models.encoder.encoder import load_encoder, save_encoder
from tests.support.small_run import write_small_run

SHAPES = {"round": (5, 5), "long": (9, 2), "odd": (3, 7)}


def write_images(folder, num=3, each=8, side=400):
    """Write images of dark ellipses, a shape a type, on other backgrounds; return a manifest."""
    rng = np.random.default_rng(0)
    lines = ["slide_id,uri,points,mpp"]
    y, x = np.mgrid[:side, :side]
    for number in range(num):
        image = np.empty((side, side, 3))
        image[:] = rng.uniform(180, 240, 3)
        rows = []
        for kind, (a, b) in list(SHAPES.items()) * each:
            centre = rng.uniform(30, side - 30, 2)
            inside = ((x - centre[0]) / a) ** 2 + ((y - centre[1]) / b) ** 2 <= 1
            image[inside] = (90, 40, 120)
            rows.append((*centre, kind))
        rows.append((5.0, 5.0, "nobody knows"))
        image += rng.normal(0, 3, image.shape)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"i{number}.png")
        points = pl.DataFrame(rows, schema=["x", "y", "type"], orient="row")
        points.write_csv(folder / f"i{number}.csv")
        lines.append(f"i{number},i{number}.png,i{number}.csv,0.5")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def config_of(manifest, **changes):
    settings = {"encoder": "random:0:resnet18", "manifest": str(manifest), "precision": "float32"}
    return EvaluateEncoderConfig(**settings | {"drop_types": ["nobody knows"]} | changes)


def test_the_command_prints_and_writes_what_it_found(manifest, tmp_path, capsys):
    weights, out = tmp_path / "own.safetensors", tmp_path / "out"
    network = load_encoder("random:0:resnet18").network
    save_encoder(weights, network, (0.5,) * 3, (0.2,) * 3, arch="resnet18")
    words = ["evaluate", "encoder", "--encoder", str(weights), "--manifest", str(manifest)]
    words += ["--drop-types", "nobody knows", "--out", str(out), "--queries", "2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "72 cells of 3 slides" in printed
    assert "note: 3 cells left out" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "gallery.png",
        "report.json",
        "report.md",
    ]
    report = json.loads((out / "report.json").read_text())
    # An untrained network of the same architecture and colours are always scored.
    dims = {name: row["dim"] for name, row in report["encoders"].items()}
    assert dims == {str(weights): 512, "random:0:resnet18": 512, "colours": 18}
    assert set(report["differences"]) == {"random:0:resnet18", "colours"}
    assert report["encoders"][str(weights)]["digest"].startswith("sha256:")
    assert report["cells"]["i1"] == {"long": 8, "odd": 8, "round": 8}
    ours, colour = (report["encoders"][name] for name in (str(weights), "colours"))
    for key in ("probe", "knn"):
        difference = report["differences"]["colours"][key]["balanced_accuracy"]
        scores = [row[key]["balanced_accuracy"] for row in (ours, colour)]
        assert np.isclose(difference, scores[0] - scores[1])
    # Even an untrained network separates shapes better than colours do.
    assert ours["probe"]["balanced_accuracy"] > 0.6
    text = (out / "report.md").read_text()
    assert f"{ours['probe']['balanced_accuracy']:.3f} (" in text
    assert "| i2 | 8 | 8 | 8 |" in text
    with Image.open(out / "gallery.png") as picture:
        assert min(picture.size) > 500


def test_scores_are_those_of_the_probe_alone(manifest):
    config = config_of(manifest)
    found = evaluate_encoder(config)
    points, _ = choose_cells(config)
    cells = crops_of(points)
    alone = probe(colours(cells.crops_NHWC), cells.types_N, cells.groups_N)
    assert found.scores["colours"]["probe"] == alone
    # The encoder is untrained itself, so the baseline has another seed.
    assert list(found.scores) == ["random:0:resnet18", "random:1:resnet18", "colours"]
    queries, near = found.retrieved
    assert near.shape == (9, 10)
    assert (cells.groups_N[near] != cells.groups_N[queries][:, None]).all()
    titles = [title for title, _, _ in tables(found, config)]
    assert len(titles) == 4


def test_cells_are_drawn_evenly(manifest):
    config = config_of(manifest, max_cells=20)
    points, notes = choose_cells(config)
    counts = [(p.types_N == kind).sum() for p in points for kind in SHAPES]
    assert sum(counts) == 20
    assert set(counts) == {2, 3}
    assert any("20 of 72 cells drawn" in note for note in notes)
    again, _ = choose_cells(config)
    other, _ = choose_cells(config_of(manifest, max_cells=20, seed=1))
    assert all(np.array_equal(a.x0y0_N2, b.x0y0_N2) for a, b in zip(points, again, strict=True))
    assert any(not np.array_equal(a.x0y0_N2, b.x0y0_N2) for a, b in zip(points, other, strict=True))


def test_what_only_one_slide_has_is_said(manifest, tmp_path):
    lines = manifest.read_text().splitlines()
    table = pl.read_csv(manifest.parent / "i0.csv")
    table = table.with_columns(pl.col("type").replace({"odd": "rare"}))
    table.write_csv(tmp_path / "i0.csv")
    where = str(manifest.parent)
    lines = [line.replace(",i", f",{where}/i") for line in lines]
    lines[1] = f"i0,{where}/i0.png,{tmp_path}/i0.csv,0.5"
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    _, notes = choose_cells(config_of(tmp_path / "m.csv"))
    assert "only slide i0 has type rare: no probe can learn this type" in notes


def test_cells_of_a_run_are_read_from_its_slides(tmp_path, monkeypatch):
    small = write_small_run(tmp_path)
    sources = {f"s{n}": {"uri": str(tmp_path / f"s{n}.png"), "mpp": 0.5} for n in range(2)}
    storage.publish_json(f"{small.run.uri}/slides.json", sources)
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (1040, 1280, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"s{number}.png")
    monkeypatch.setattr(module, "_names_to_score", lambda config: [config.encoder, module.COLOURS])
    settings = {"run": small.run.uri, "encoder": "random:0:resnet18", "max_cells": 60}
    found = evaluate_encoder(EvaluateEncoderConfig(**settings))
    assert len(found.cells.types_N) == 60
    assert set(found.cells.groups_N) == {"s0", "s1"}
    assert any("no annotations" in note for note in found.notes)
    with pytest.raises(ValueError, match="a score needs two types, and two slides"):
        evaluate_encoder(EvaluateEncoderConfig(**settings, slides=["s1"]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"manifest": None}, "give either manifest .* or run"),
        ({"run": "r"}, "give either manifest .* or run"),
        ({"slides": ["s"]}, "slides are those of run"),
        ({"max_cells": 0}, "max_cells is 0"),
        ({"encoder": "tokens"}, "'tokens' embeds no crops"),
        ({"also": ["types"]}, "'types' embeds no crops"),
    ],
)
def test_settings_that_say_nothing(changes, reason):
    with pytest.raises(ValueError, match=reason):
        EvaluateEncoderConfig(**{"encoder": "imagenet", "manifest": "m.csv"} | changes)


def test_what_cannot_be_judged_is_said_before_anything_is_embedded(manifest):
    with pytest.raises(ValueError, match="drop_types names nobody; the cells have long, nobody k"):
        evaluate_encoder(config_of(manifest, drop_types=["nobody"]))
    with pytest.raises(FileNotFoundError, match=r"missing\.pth: no such file"):
        evaluate_encoder(config_of(manifest, encoder="missing.pth"))
    with pytest.raises(ValueError, match="a score needs two types"):
        evaluate_encoder(config_of(manifest, drop_types=["nobody knows", *SHAPES][:3]))


def test_colours_of_real_cells(data_dir, tmp_path):
    """The baseline of every encoder was measured once, and must not change."""
    folder = data_dir / "types_crc"
    if not folder.is_dir():
        pytest.skip(f"typed cells not found at {folder}")
    lines = ["slide_id,uri,points,mpp"]
    lines += [f"{p.stem},{p},{p.with_suffix('.csv')},0.55" for p in sorted(folder.glob("*.png"))]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    points, _ = choose_cells(config_of(tmp_path / "m.csv", drop_types=["unlabelled"]))
    cells = crops_of(points)
    assert len(cells.types_N) == 878 + 242 + 391 + 158
    found = probe(colours(cells.crops_NHWC), cells.types_N, cells.groups_N)
    assert 0.45 < found["balanced_accuracy"] < 0.55
    assert found["interval_slides"][0] < found["balanced_accuracy"]
