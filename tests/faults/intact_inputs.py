"""Small intact inputs: spots, segmentations, heads, encoders, settings and manifests.

Each input is a folder. Its reader is named in `judge.READERS`.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import anndata
import geopandas
import h5py
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import shapely
import tifffile
import torch
import yaml
from safetensors.torch import save_file
from scipy import io as scipy_io
from scipy import sparse

from scellst_ray.core import schemas
from scellst_ray.models.encoder.encoder import save_encoder
from scellst_ray.models.encoder.named_networks import make_random_network
from scellst_ray.models.mil.head import MilHead, save_head
from scellst_ray.models.mil.stored_head import Formula
from scellst_ray.nuclei.imported.read_json import PANNUKE
from tests.support.mil_heads import info_of

MPP = 0.5
NUM_SPOTS, NUM_GENES = 40, 6
TINY = "timm:test_resnet"
GENES = [f"GENE{number}" for number in range(NUM_GENES)]
POSITIONS = (
    *("barcode", "in_tissue", "array_row", "array_col"),
    *("pxl_row_in_fullres", "pxl_col_in_fullres"),
)


@dataclass(frozen=True)
class Intact:
    """An intact input.

    Attributes:
        name: Its name.
        kind: 'spots', 'segmentation', 'head', 'encoder', 'config' or 'manifest'.
        reader: Name of its reader in `judge.READERS`.
        folder: Folder of its files.
        path: What the reader is given, within the folder; empty: the folder itself.
        files: The files to mutate, within the folder.
    """

    name: str
    kind: str
    reader: str
    folder: Path
    path: str
    files: tuple[str, ...]


def write_inputs(root):
    """Write all inputs below a folder and return them."""
    made = []
    for writer in (write_spots, write_nuclei, write_heads, write_encoders, write_settings):
        for name, kind, reader, path, files in writer(root):
            folder = root / name
            found = files or tuple(
                str(file.relative_to(folder))
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            )
            made.append(Intact(name, kind, reader, folder, path, found))
    return made


def counts_BG(rows=NUM_SPOTS):
    return np.random.default_rng(0).poisson(2.0, (rows, NUM_GENES)).astype(np.int32)


def barcodes(rows=NUM_SPOTS):
    return [f"{'ACGT'[i % 4]}{i:03d}ACGT-1" for i in range(rows)]


def positions():
    """Return the positions of spots, in a grid of 5 columns."""
    rows = np.arange(NUM_SPOTS)
    values = [barcodes(), (rows % 7 > 0).astype(int), rows // 5, rows % 5]
    values += [rows // 5 * 200 + 100, rows % 5 * 200 + 100]
    return pl.DataFrame(dict(zip(POSITIONS, values, strict=True)))


def write_matrix_h5(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    matrix = sparse.csc_matrix(counts_BG(len(names)).T)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group.create_dataset(name, data=getattr(matrix, name), compression="gzip")
        group["shape"] = np.array(matrix.shape, np.int32)
        group["barcodes"] = np.array(names, "S")
        group["features/id"] = np.array([f"ENSG{i:011d}" for i in range(NUM_GENES)], "S")
        group["features/name"] = np.array(GENES, "S")
        kinds = ["Gene Expression"] * (NUM_GENES - 1) + ["Antibody Capture"]
        group["features/feature_type"] = np.array(kinds, "S")
        group["features/genome"] = np.array(["GRCh38"] * NUM_GENES, "S")


def write_mex(folder):
    folder.mkdir(parents=True)
    scipy_io.mmwrite(folder / "matrix.mtx", sparse.coo_matrix(counts_BG().T))
    features = [f"ENSG{i:011d}\t{gene}\tGene Expression\n" for i, gene in enumerate(GENES)]
    texts = {
        "matrix.mtx": (folder / "matrix.mtx").read_text(),
        "features.tsv": "".join(features),
        "barcodes.tsv": "".join(f"{name}\n" for name in barcodes()),
    }
    (folder / "matrix.mtx").unlink()
    for name, text in texts.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))


def write_factors(outs, **more):
    values = {"spot_diameter_fullres": 130.0, "tissue_hires_scalef": 0.5} | more
    outs.joinpath("spatial").mkdir(parents=True, exist_ok=True)
    (outs / "spatial/scalefactors_json.json").write_text(json.dumps(values, indent=1))


def write_spots(root):
    """Write spots in all formats; return name, kind, reader, path and files of each."""
    write_matrix_h5(root / "outs_h5/filtered_feature_bc_matrix.h5", barcodes())
    write_factors(root / "outs_h5")
    positions().write_csv(root / "outs_h5/spatial/tissue_positions.csv")

    write_mex(root / "outs_mex/filtered_feature_bc_matrix")
    write_factors(root / "outs_mex")
    listed = root / "outs_mex/spatial/tissue_positions_list.csv"
    positions().write_csv(listed, include_header=False)

    write_matrix_h5(root / "outs_hd/filtered_feature_bc_matrix.h5", barcodes())
    write_factors(root / "outs_hd", bin_size_um=100.0, microns_per_pixel=MPP)
    positions().write_parquet(root / "outs_hd/spatial/tissue_positions.parquet")

    for name in ("h5ad", "h5ad_layers"):
        (root / name).mkdir()
        make_section(layers=name == "h5ad_layers").write_h5ad(root / name / "section.h5ad")
    write_st_array(root / "st_array")
    write_xenium(root / "xenium")
    write_hest(root / "hest")
    names = ("outs_h5", "outs_mex", "outs_hd")
    made = [(name, "spots", "spots", "", ()) for name in names]
    made += [(name, "spots", "spots", "section.h5ad", ()) for name in ("h5ad", "h5ad_layers")]
    made.append(("st_array", "spots", "st_array", "", ()))
    made.append(("xenium", "spots", "xenium", "", ()))
    made.append(("hest", "spots", "hest", "", ("metadata/T1.json", "st/T1.h5ad", "wsis/T1.tif")))
    return made


def make_section(*, layers):
    table = positions().to_pandas().set_index("barcode")
    table["region"] = pd.Categorical(["a", "b"] * (NUM_SPOTS // 2))
    counts = sparse.csr_matrix(counts_BG().astype(np.float32))
    section = anndata.AnnData(counts, obs=table, var=pd.DataFrame(index=GENES))
    xy = ["pxl_col_in_fullres", "pxl_row_in_fullres"]
    section.obsm["spatial"] = table[xy].to_numpy(np.float64)
    factors = {"spot_diameter_fullres": 110.0}
    section.uns["spatial"] = {"S": {"scalefactors": factors}}
    if layers:
        section.layers["counts"] = counts.toarray()
        section.X = np.log1p(counts).tocsc()
        section.raw = section.copy()
    return section


def write_st_array(folder):
    folder.mkdir()
    names = [f"{i % 5 + 1}x{i // 5 + 1}" for i in range(NUM_SPOTS)]
    rows = ["\t".join(map(str, [name, *row])) for name, row in zip(names, counts_BG(), strict=True)]
    (folder / "counts.tsv").write_text("\n".join(["\t" + "\t".join(GENES), *rows]) + "\n")
    lines = ["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected"]
    for name in names:
        x, y = map(int, name.split("x"))
        lines.append(f"{x}\t{y}\t{x}.02\t{y}.01\t{x * 400}.5\t{y * 400}.25\t{int(x > 1)}")
    (folder / "positions.tsv").write_text("\n".join(lines) + "\n")


def write_xenium(folder):
    names = [f"cell{i:03d}-1" for i in range(NUM_SPOTS)]
    write_matrix_h5(folder / "cell_feature_matrix.h5", names)
    place = np.arange(NUM_SPOTS) * 10.0
    cells = {"cell_id": names, "x_centroid": place, "y_centroid": place[::-1]}
    pl.DataFrame(cells).write_parquet(folder / "cells.parquet")
    (folder / "experiment.xenium").write_text(json.dumps({"pixel_size": 0.2125, "num_cells": 40}))
    np.savetxt(folder / "alignment.csv", [[1.0, 0.1, 5], [-0.1, 1.0, 7], [0, 0, 1]], delimiter=",")


def write_hest(folder):
    for name in ("st", "wsis", "metadata"):
        (folder / name).mkdir(parents=True)
    make_section(layers=False).write_h5ad(folder / "st/T1.h5ad")
    image = np.full((300, 400, 3), 230, np.uint8)
    resolution = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(folder / "wsis/T1.tif", image, **resolution)
    metadata = {
        "pixel_size_um_estimated": MPP,
        "pixel_size_um_embedded": MPP * 1.005,
        "fullres_px_width": 400,
        "fullres_px_height": 300,
        "inter_spot_dist": 100.0,
        "spot_diameter": 55.0,
        "patient": "Patient 1",
        "organ": "Prostate",
    }
    (folder / "metadata/T1.json").write_text(json.dumps(metadata))


def write_nuclei(root):
    """Write segmentations in all formats."""
    rng = np.random.default_rng(1)
    squares = [
        (np.array([[0, 0], [14, 0], [14, 12], [0, 12]]) + rng.integers(0, 900, 2)).tolist()
        for _ in range(60)
    ]
    polygons = [{"type": "Polygon", "coordinates": [[*s, s[0]]]} for s in squares]
    cells = [
        {"bbox": [s[0], s[2]], "centroid": s[0], "contour": s, "type_prob": 0.9, "type": i % 6}
        for i, s in enumerate(squares)
    ]
    features = [
        {
            "type": "Feature",
            "id": str(i),
            "geometry": polygon,
            "properties": {"objectType": "detection", "classification": {"name": "Tumour"}},
        }
        for i, polygon in enumerate(polygons)
    ]
    of_class = {
        "type": "Feature",
        "geometry": {"type": "MultiPolygon", "coordinates": [p["coordinates"] for p in polygons]},
        "properties": {"objectType": "annotation", "classification": {"name": "Dead"}},
    }
    type_map = {str(number): name for number, name in PANNUKE.items()}
    texts = {
        "cells.json": json.dumps({"wsi_metadata": {}, "type_map": type_map, "cells": cells}),
        "qupath.geojson": json.dumps({"type": "FeatureCollection", "features": features}),
        "classes.geojson": json.dumps([of_class]),
    }
    made = []
    for number, (name, text) in enumerate(texts.items()):
        files = {
            f"nuclei_json{number}/{name}": text.encode(),
            f"nuclei_gz{number}/{name}.gz": gzip.compress(text.encode()),
            f"nuclei_snappy{number}/{name}.snappy": pa.compress(
                text.encode(), "snappy", asbytes=True
            ),
        }
        made += [write_one(root, file, content) for file, content in files.items()]
    frame = geopandas.GeoDataFrame(
        {"class": ["Dead", "Tumour"] * 30},
        geometry=[shapely.polygons(s) for s in squares],
        crs=None,
    )
    for name, options in {"wkb": {}, "native": {"geometry_encoding": "geoarrow"}}.items():
        (root / f"nuclei_{name}").mkdir()
        frame.to_parquet(root / f"nuclei_{name}/nuclei.parquet", **options)
        made.append((f"nuclei_{name}", "nuclei.parquet"))
    return [(name, "segmentation", "segmentation", file, ()) for name, file in made]


def write_one(root, name, content):
    """Write the only file of an input; return the input's name and the file's."""
    folder, file = name.split("/")
    (root / folder).mkdir()
    (root / name).write_bytes(content)
    return folder, file


def write_heads(root):
    """Write heads: a plain one, and an ensemble for counts."""
    formulas = {"head": Formula(), "head_counts": Formula(loss="nb_total", ensemble=2)}
    for name, formula in formulas.items():
        torch.manual_seed(0)
        (root / name).mkdir()
        head = MilHead(20, 3, hidden_dim=8, formula=formula)
        save_head(str(root / name / "head.safetensors"), head, info_of())
    return [(name, "head", "head", "head.safetensors", ()) for name in formulas]


def write_encoders(root):
    """Write a small encoder of ours, and state dicts in torch's two formats."""
    network, _ = make_random_network(0, TINY, "intact")
    for name in ("encoder", "encoder_torch", "encoder_old_torch", "encoder_foreign"):
        (root / name).mkdir()
    provenance = {"slides": ["a"], "num_cells": 5, "release": "0.1.0"}
    statistics = ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    path = root / "encoder/encoder.safetensors"
    save_encoder(path, network, *statistics, arch=TINY, provenance=provenance)
    state = {"conv1.weight": torch.ones(4, 3, 3, 3), "fc.bias": torch.zeros(5)}
    save_file(state, root / "encoder_foreign/model.safetensors")
    torch.save({"state_dict": state}, root / "encoder_torch/model.pth")
    old = {"_use_new_zipfile_serialization": False}
    torch.save({"state_dict": state}, root / "encoder_old_torch/model.pth", **old)
    made = [("encoder", "encoder.safetensors"), ("encoder_foreign", "model.safetensors")]
    made += [(name, "model.pth") for name in ("encoder_torch", "encoder_old_torch")]
    return [(name, "encoder", "encoder", file, ()) for name, file in made]


def write_settings(root):
    """Write settings of commands and of a run, and manifests."""
    tiles = {"manifest": "m.csv", "out": "run", "core_px": 256, "workers": 2, "gpus": False}
    settings = {
        "extract": tiles | {"encoder": "none", "slides": ["a", "b"], "tile_timeout_s": 60.0},
        "predict": tiles | {"head": "head", "store_embeddings": True, "read_mpp": 0.5},
        "train": {"manifest": "m.csv", "cells": "run", "out": "head", "genes": "hvg:50"},
        "pretrain": {"crops": ["run"], "out": "encoder", "epochs": 20, "batch": 16},
    }
    made = []
    for command, values in settings.items():
        folder = root / f"config_{command}"
        folder.mkdir()
        (folder / "job.yaml").write_text(yaml.safe_dump(values))
        made.append((folder.name, "config", f"config {command}", "job.yaml", ()))
    folder = root / "config_run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings["extract"]))
    identity = {"job": "extract", "store_embeddings": False}
    info = {"digest": "0" * 16, "identity": identity, "format_version": schemas.FORMAT_VERSION}
    (folder / "run.json").write_text(json.dumps(info))
    made.append((folder.name, "config", "config of a run", "", ("config.yaml",)))
    rows = {
        "slide_id": ["a", "b", "c"],
        "uri": ["a.svs", "s3://bucket/b.tiff", "c.tif"],
        "mpp": [0.5, None, 0.25],
        "patient_id": ["P1", "P2", "P3"],
        "spots": ["outs", None, "c.h5ad"],
    }
    for end in ("csv", "parquet"):
        folder = root / f"manifest_{end}"
        folder.mkdir()
        write = {"csv": pl.DataFrame.write_csv, "parquet": pl.DataFrame.write_parquet}[end]
        write(pl.DataFrame(rows), folder / f"manifest.{end}")
        made.append((folder.name, "manifest", "manifest", f"manifest.{end}", ()))
    return made
