"""`scellst-ray evaluate expression` equals sums by hand, and refuses unusable inputs."""

import dataclasses
import json
from pathlib import Path

import cv2
import h5py
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from scipy import sparse, stats
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from scellst_ray import storage
from scellst_ray.commands.cli import main
from scellst_ray.core import schemas
from scellst_ray.evaluation.expression.colour_baseline import (
    PENALTIES,
    disc_colours,
    fit_colour_ridge,
    slide_colours,
)
from scellst_ray.evaluation.expression.config import EvaluateExpressionConfig
from scellst_ray.evaluation.expression.evaluate import evaluate_expression
from scellst_ray.models.mil.head import MilHead, formula_of, save_head
from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.synthetic.slide import SyntheticConfig, make_tissue, truth_table
from scellst_ray.slides.synthetic.spots import write_space_ranger
from scellst_ray.spots.read import read_spots
from scellst_ray.stages.networks import vectors

LIMITS = {"min_gene_counts": 1, "min_spot_share": 0.0, "min_spot_counts": 5, "drop_prefix": "MT-"}
PANEL = [3, 0, 4, 1]
SCALING = {"s0": [1.0, 2.0, 1.0, 3.0], "s1": [3.0, 2.0, 2.0, 1.0]}


def tissue_of(number):
    config = SyntheticConfig(
        seed=number,
        width_um=500.0,
        height_um=400.0,
        num_genes=8,
        spot_pitch_um=60.0,
        spot_diameter_um=50.0,
        capture_efficiency=0.5,
    )
    return make_tissue(config)


def write_image(path, tissue):
    """Write an image whose nuclei have the colour of their type, which a ridge can learn."""
    mpp = tissue.config.mpp
    size = (round(tissue.config.height_um / mpp), round(tissue.config.width_um / mpp))
    image = np.full((*size, 3), 230, np.uint8)
    colours = np.random.default_rng(0).integers(20, 200, (9, 3))
    nuclei = tissue.layout.nuclei
    for (x, y), kind in zip(nuclei.centroid_um / mpp, nuclei.type_index, strict=True):
        cv2.circle(image, (int(x), int(y)), 8, colours[kind].tolist(), -1)
    cv2.imwrite(str(path), image)


def hidden_of(expected_NP):
    """Return a factor whose softplus, through the identity, is `expected_NP`."""
    hidden = np.zeros((len(expected_NP), 256))
    hidden[:, : expected_NP.shape[1]] = expected_NP + np.log(-np.expm1(-expected_NP))
    return hidden.astype(np.float16)


def write_run(folder, tissue, loss):
    """Write a run of `predict` on s2 that is close to the truth; return its predictions."""
    run = RunFolder(str(folder), "0123456789abcdef")
    truth = truth_table(tissue)
    ids = np.arange(len(truth)) * 3 + 5
    rates = tissue.expected_NG[:, PANEL]
    noisy = rates * np.random.default_rng(0).uniform(0.5, 1.5, rates.shape) + 0.01
    if loss == "mse":
        share = noisy / tissue.expected_NG.sum(1, keepdims=True)
        wanted = np.log1p(1e4 * share) / np.mean(list(SCALING.values()), axis=0)
    else:
        wanted = noisy
    head = MilHead(8, 4, formula=formula_of("ours", loss))
    with torch.no_grad():
        head.last.weight.copy_(torch.eye(4, 256))
        head.last.bias.zero_()
    names = [tissue.programme.gene_names[column] for column in PANEL]
    info = {
        "genes": names,
        "scaling": SCALING,
        "embedding_dim": 8,
        "encoder_digest": "e",
        "training_slides": ["s0", "s1"],
        "metrics": {},
        "supervision": {"filters": LIMITS},
        "formula": dataclasses.asdict(head.formula),
    }
    save_head(f"{run.uri}/head.safetensors", head, info)
    cells = pa.table(
        {
            "slide_id": pa.repeat("s2", len(ids)),
            "cell_id": pa.array(ids),
            "x0": truth["x0"].cast(pa.float32(), safe=False),
            "y0": truth["y0"].cast(pa.float32(), safe=False),
            "area_um2": truth["area_um2"].cast(pa.float32(), safe=False),
            "nucleus_type": truth["nucleus_type"],
            "type_prob": pa.nulls(len(ids), pa.float32()),
            "polygon": truth["polygon"],
        }
    )
    schema = schemas.cells_schema(None, with_bbox=False)
    storage.publish_table(run.cells_uri("s2"), schemas.conform(cells, schema, "CELLS", run.digest))
    columns = {name: cells[name] for name in ("slide_id", "cell_id")}
    table = pa.table(columns | {"hidden": vectors(hidden_of(wanted))})
    signed = schemas.conform(table, schemas.expression_schema(), "EXPRESSION", run.digest)
    storage.publish_table(run.expression_uri("s2"), signed)
    record = {"slide_id": "s2", "status": "done", "tables": ["CELLS", "EXPRESSION"]}
    record |= {"mpp": tissue.config.mpp, "num_cells": len(ids)}
    storage.publish_json(run.record_uri("s2"), record)
    info = {"digest": run.digest, "identity": {}, "format_version": 1}
    storage.publish_json(f"{run.uri}/run.json", info)
    return wanted


def write_xenium(outs, tissue):
    """Write a third of the true nuclei as Xenium cells, a little shifted."""
    outs.mkdir()
    rows = np.arange(0, len(tissue.expected_NG), 3)
    xy_um = tissue.layout.nuclei.centroid_um[rows] + 0.5
    counts = np.random.default_rng(2).poisson(3 * tissue.expected_NG[rows])
    ids = [f"c{row}" for row in rows]
    columns = {"cell_id": ids, "x_centroid": xy_um[:, 0], "y_centroid": xy_um[:, 1]}
    pl.DataFrame(columns).write_parquet(outs / "cells.parquet")
    matrix = sparse.csc_matrix(counts.T[:6].astype(np.int32))  # two genes were not measured
    with h5py.File(outs / "cell_feature_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name).astype(np.int64)
        group["shape"] = np.array(matrix.shape, np.int32)
        group["barcodes"] = np.array(ids, "S")
        group["features/name"] = np.array(tissue.programme.gene_names[:6], "S")
        group["features/id"] = np.array(tissue.programme.gene_names[:6], "S")
        group["features/feature_type"] = np.array(["Gene Expression"] * 6, "S")
    return rows, counts[:, :6]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return two training slides and one to predict, with a run of either kind of head."""
    folder = tmp_path_factory.mktemp("study")
    lines = ["slide_id,uri,mpp,spots,spot_diameter_um"]
    for number in range(3):
        tissue = tissue_of(number)
        write_image(folder / f"s{number}.png", tissue)
        genes = tissue.programme.gene_names
        write_space_ranger(folder / f"o{number}", tissue.config, tissue.spots, genes)
        lines.append(f"s{number},s{number}.png,{tissue.config.mpp},o{number},50")
    (folder / "train.csv").write_text("\n".join(lines[:3]) + "\n")
    (folder / "test.csv").write_text("\n".join([lines[0], lines[3]]) + "\n")
    rows, counts = write_xenium(folder / "xenium", tissue)
    (folder / "cells.csv").write_text(
        f"slide_id,uri,mpp,xenium\ns2,s2.png,{tissue.config.mpp},xenium\n"
    )
    wanted = {loss: write_run(folder / loss, tissue, loss) for loss in ("mse", "nb")}
    return folder, tissue, wanted, (rows, counts)


def config_of(folder, run="mse", **changes):
    settings = {
        "run": str(folder / run),
        "manifest": str(folder / "test.csv"),
        "train_manifest": str(folder / "train.csv"),
        "bootstraps": 20,
    }
    return EvaluateExpressionConfig(**settings | changes)


def log_counts(spots, kept):
    counts = spots.counts.toarray()[kept]
    return np.log1p(1e4 * counts / counts.sum(1, keepdims=True))[:, PANEL], counts.sum(1)


@pytest.mark.parametrize("loss", ["mse", "nb"])
def test_spots_equal_a_slow_loop(study, loss):
    folder, tissue, wanted, _ = study
    found = evaluate_expression(config_of(folder, loss))
    (part,) = found.slides["s2"]
    assert found.notes == []
    rows = {row.slide_id: row for row in [*read_manifest(str(folder / "train.csv"))]}
    truths, libraries, colours = [], [], []
    for slide_id, row in rows.items():
        spots = read_spots({**row.columns, "slide_id": slide_id}, row.mpp)
        kept = np.flatnonzero(np.asarray(spots.counts.sum(1)).ravel() >= 5)
        values, library = log_counts(spots, kept)
        truths.append(values / SCALING[slide_id])
        libraries.append(np.median(library))
        colours.append(slide_colours(row, spots.select(kept)))
    (row,) = read_manifest(str(folder / "test.csv"))
    spots = read_spots({**row.columns, "slide_id": "s2"}, row.mpp)
    xy0 = tissue.layout.nuclei.centroid_um.astype(np.float32) / np.float32(row.mpp)
    scale = np.mean(list(SCALING.values()), axis=0)
    kept, predicted = [], []
    for spot in range(len(spots)):
        under = np.hypot(*(xy0 - spots.xy0[spot]).T) <= spots.radius0
        if spots.counts[spot].sum() >= 5 and under.any():
            kept.append(spot)
            predicted.append(wanted[loss][under].mean(0))
    assert len(kept) > 25
    predicted = np.array(predicted)
    if loss == "nb":
        predicted = np.log1p(predicted * 1e4 / np.mean(libraries)) / scale
    truth = log_counts(spots, kept)[0] / scale
    scores = part.scores["ours"].by_gene
    for gene in range(4):
        a, b = predicted[:, gene], truth[:, gene]
        assert scores["pcc"][gene] == pytest.approx(stats.pearsonr(a, b)[0], abs=2e-3)
        assert scores["mae"][gene] == pytest.approx(np.abs(a - b).mean(), rel=5e-3)
    assert scores["pcc"].mean() > 0.4
    assert part.about["spots"] == len(kept)
    mean = np.concatenate(truths).mean(0)
    expected = np.sqrt(((truth - mean) ** 2).mean(0))
    np.testing.assert_allclose(part.scores["mean"].by_gene["rmse"], expected, rtol=1e-5)
    scaler = StandardScaler().fit(np.concatenate(colours))
    ridge = RidgeCV(PENALTIES).fit(
        scaler.transform(np.concatenate(colours)), np.concatenate(truths)
    )
    colour = ridge.predict(scaler.transform(slide_colours(row, spots.select(np.array(kept)))))
    expected = [stats.pearsonr(colour[:, g], truth[:, g])[0] for g in range(4)]
    np.testing.assert_allclose(part.scores["colour_ridge"].by_gene["pcc"], expected, rtol=1e-4)


def test_single_cells_equal_a_slow_loop(study):
    folder, _, wanted, (rows, counts) = study
    config = config_of(folder, manifest=str(folder / "cells.csv"))
    (part,) = evaluate_expression(config).slides["s2"]
    assert part.level == "cells"
    measured = [column for column in PANEL if column < 6]
    columns = [PANEL.index(column) for column in measured]
    total = counts.sum(1)
    truth = np.log1p(1e4 * counts[:, measured][total > 0] / total[total > 0, None])
    predicted = wanted["mse"][rows[total > 0]][:, columns]
    assert part.about["pairs"] == pytest.approx((total > 0).sum(), abs=5)
    assert part.about["median_distance_um"] == pytest.approx(0.71, abs=0.02)
    assert part.about["genes_not_measured"] == 4 - len(measured)
    for gene in range(len(measured)):
        expected = stats.spearmanr(predicted[:, gene], truth[:, gene])[0]
        assert part.scores["ours"].by_gene["scc"][gene] == pytest.approx(expected, abs=0.03)


def test_colours_of_a_cell_are_those_of_a_spot_around_it(study):
    folder, tissue, _, (rows, counts) = study
    config = config_of(folder, manifest=str(folder / "cells.csv"))
    (part,) = evaluate_expression(config).slides["s2"]
    train = list(read_manifest(str(folder / "train.csv")))
    colours, truths = [], []
    for row in train:
        spots = read_spots({**row.columns, "slide_id": row.slide_id}, row.mpp)
        kept = np.flatnonzero(np.asarray(spots.counts.sum(1)).ravel() >= 5)
        colours.append(slide_colours(row, spots.select(kept)))
        truths.append(log_counts(spots, kept)[0] / SCALING[row.slide_id])
    ridge = fit_colour_ridge(np.concatenate(colours), np.concatenate(truths))
    (row,) = read_manifest(str(folder / "cells.csv"))
    xy0 = tissue.layout.nuclei.centroid_um[rows][counts.sum(1) > 0] / row.mpp
    with Slide(Path(row.uri), row.uri, row.mpp) as slide:
        seen = np.stack([disc_colours(slide, point, 25 / row.mpp) for point in xy0])
    total = counts.sum(1)
    column = next(column for column in PANEL if column < 6)
    truth = np.log1p(1e4 * counts[:, column][total > 0] / total[total > 0])
    predicted = ridge.predict(seen)[:, PANEL.index(column)]
    expected = stats.pearsonr(predicted, truth)[0]
    assert part.scores["colour_ridge"].by_gene["pcc"][0] == pytest.approx(expected, abs=0.03)


def test_command_prints_and_writes(study, tmp_path, capsys):
    folder, *_ = study
    out = tmp_path / "scores.json"
    words = ["evaluate", "expression", f"--run={folder / 'mse'}", f"--out={out}"]
    words += [f"--manifest={folder / 'test.csv'}", f"--train-manifest={folder / 'train.csv'}"]
    assert main([*words, "--slides=s2", "--bootstraps=10", "--seed=3"]) == 0
    text = capsys.readouterr().out
    assert "s2: " in text
    assert "colour_ridge" in text
    report = json.loads(out.read_text())
    spots = report["slides"]["s2"]["spots"]
    assert set(spots["models"]) == {"ours", "colour_ridge", "mean", "ours_shuffled"}
    assert abs(spots["models"]["ours_shuffled"]["pcc"]["mean"]) < 0.3
    assert spots["models"]["mean"]["pcc"]["mean"] is None
    assert len(spots["by_gene"]["gene"]) == len(spots["by_gene"]["ours"]["pcc_low"]) == 4
    assert report["all"]["spots"]["ours"]["pcc"] == spots["models"]["ours"]["pcc"]["mean"]
    assert report["config"]["seed"] == 3
    table = out.with_suffix(".md").read_text()
    assert f"## s2: {spots['spots']} spots, 4 genes" in table
    assert "| ours - colour_ridge |" in table
    assert "| mean | - | - | - |" in table
    assert main([*words, "--slides=s2", "--bootstraps=0", "--colour=false"]) == 0
    bare = json.loads(out.read_text())["slides"]["s2"]["spots"]["models"]
    assert set(bare) == {"ours", "mean", "ours_shuffled"}
    assert "over_rows" not in bare["ours"]["pcc"]


def test_what_cannot_be_compared_is_refused(study, tmp_path):
    folder, tissue, *_ = study
    with pytest.raises(ValueError, match=r"train\.csv: no spots and no xenium for slides"):
        evaluate_expression(config_of(folder, manifest=str(folder / "train.csv"), slides=["s2"]))
    with pytest.raises(ValueError, match=r"no spots for s0, s1, which the head was trained on"):
        evaluate_expression(config_of(folder, train_manifest=str(folder / "test.csv")))
    foreign = [f"X{i}" for i in range(8)]
    write_space_ranger(tmp_path / "o", tissue.config, tissue.spots, foreign)
    line = f"s2,{folder / 's2.png'},{tissue.config.mpp},{tmp_path / 'o'}"
    (tmp_path / "m.csv").write_text(f"slide_id,uri,mpp,spots\n{line}\n")
    with pytest.raises(ValueError, match="share no gene with the head: it predicts"):
        evaluate_expression(config_of(folder, manifest=str(tmp_path / "m.csv"), colour=False))
    for wrong, words in (
        ({"out": "scores.csv"}, "must end in .json"),
        ({"radius_um": 0.0}, "radius_um is 0.0"),
        ({"bootstraps": -1}, "bootstraps is -1; it must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            config_of(folder, **wrong)
