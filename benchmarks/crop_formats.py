"""Measure codecs for crops, sizes of row groups, and reading for training against Ray Data.

    python benchmarks/crop_formats.py [FOLDER] [--num 800] [--crops 20000] [--json FILE]

FOLDER is the `data` folder of real slides. Rates are crops per second of CPU time of this process
on one thread, so that other programs on the machine matter little. Rates in the comparison with
Ray Data are also per second of wall time, since other processes do its work. The store of the
second half repeats the real crops.
"""

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.core.geometry import Box
from scellst_ray.nuclei.hematoxylin import segment
from scellst_ray.runs import crop_files
from scellst_ray.runs.crop_files import Spool, decode_into, file_uri, index_uri
from scellst_ray.runs.crop_store import CropFiles, CropStore, image_bytes, open_store
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.tiling import default_read_mpp
from scellst_ray.stages.cut_crops import cut_window, windows
from scellst_ray.training.crop_order import CropOrder, prefetch

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"
SLIDES = {
    "cmu": ("slides/cmu-1-small-region.svs", None),
    "tma": ("slides/instanseg_tma.tiff", None),
    "her2st": ("st_her2st/C2_5714_HE_BT_C2.jpg", 0.687),
    "monuseg": ("seg_monuseg/images/TCGA-18-5592-01Z-00-DX1.png", 0.25),
    "crc": ("types_crc/img20.png", 0.55),
}
SIDE_UM = 600.0
LEVEL = cv2.IMWRITE_PNG_COMPRESSION
JPEG, WEBP = cv2.IMWRITE_JPEG_QUALITY, cv2.IMWRITE_WEBP_QUALITY
FULL_COLOUR = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
CODECS: dict[str, tuple[str, tuple[int, ...]]] = {
    "PNG 1": (".png", (LEVEL, 1)),
    "PNG 6": (".png", (LEVEL, 6)),
    "JPEG 90": (".jpg", (JPEG, 90)),
    "JPEG 90 4:4:4": (".jpg", (JPEG, 90, *FULL_COLOUR)),
    "JPEG 95": (".jpg", (JPEG, 95)),
    "JPEG 95 4:4:4": (".jpg", (JPEG, 95, *FULL_COLOUR)),
    "WebP lossless": (".webp", (WEBP, 101)),
    "WebP 90": (".webp", (WEBP, 90)),
}
Images = NDArray[np.uint8]


def real_crops(folder: Path, num: int) -> dict[str, Images]:
    """Return up to `num` crops [N, 72, 72, 3] from the middle of each slide."""
    found = {}
    for name, (path, mpp) in SLIDES.items():
        with Slide(folder / path, mpp=mpp) as slide:
            side = min(round(SIDE_UM / slide.mpp), slide.width0, slide.height0)
            box = Box((slide.width0 - side) // 2, (slide.height0 - side) // 2, side, side)
            read_mpp = default_read_mpp(slide.mpp)
            image, frame = slide.read(box, read_mpp)
            xy0 = frame.to_level0(segment(image, read_mpp).centroid_px)
            xy0 = xy0[np.random.default_rng(0).permutation(len(xy0))[:num]]
            parts = windows(xy0, read_mpp / slide.mpp)
            found[name] = np.concatenate([cut_window(slide, xy0[i], read_mpp) for i in parts])
    return found


def timed(work: Callable[[], Any], num: int) -> tuple[Any, float]:
    """Return the result of `work`, and `num` over its CPU seconds."""
    started = time.process_time()
    done = work()
    return done, num / (time.process_time() - started)


def measure_codec(name: str, crops: dict[str, Images]) -> dict[str, Any]:
    """Return bytes per crop by slide, mean error in grey levels, crops/s of coding and decoding."""
    suffix, parameters = CODECS[name]
    row: dict[str, Any] = {"bytes": {}, "error": {}}
    whole = np.concatenate(list(crops.values()))
    bgr = [cv2.cvtColor(crop, cv2.COLOR_RGB2BGR) for crop in whole]
    coded, row["encoded_per_s"] = timed(
        lambda: [np.asarray(cv2.imencode(suffix, crop, parameters)[1]) for crop in bgr], len(bgr)
    )
    out = np.empty_like(whole)
    _, row["decoded_per_s"] = timed(lambda: decode_into(coded, out), len(bgr))
    first = 0
    for slide, images in crops.items():
        part = slice(first, first + len(images))
        row["bytes"][slide] = float(np.mean([len(image) for image in coded[part]]))
        row["error"][slide] = float(np.abs(out[part].astype(np.int16) - images).mean())
        first = part.stop
    return row


def measure_raw(compression: str, crops: dict[str, Images]) -> dict[str, Any]:
    """Return the same figures for raw pixels in a Parquet column."""
    row: dict[str, Any] = {"bytes": {}, "error": dict.fromkeys(crops, 0.0)}
    seconds, num = [0.0, 0.0], 0
    for slide, images in crops.items():
        sink = BytesIO()
        table = pa.table({"image": pa.array([image.tobytes() for image in images], pa.binary())})
        _, rate = timed(
            lambda table=table, sink=sink: pq.write_table(  # type: ignore[misc]
                table, sink, compression=compression, use_dictionary=False, write_statistics=False
            ),
            len(images),
        )
        seconds[0] += len(images) / rate
        out = np.empty_like(images)

        def decode(sink: BytesIO = sink, out: Images = out) -> None:
            column = pq.read_table(sink, use_threads=False)["image"]
            for image, value in zip(out, image_bytes(column), strict=True):
                image[:] = value.reshape(image.shape)

        _, rate = timed(decode, len(images))
        seconds[1] += len(images) / rate
        row["bytes"][slide] = len(sink.getvalue()) / len(images)
        num += len(images)
    return row | {"encoded_per_s": num / seconds[0], "decoded_per_s": num / seconds[1]}


def write_store(folder: Path, crops: dict[str, Images], num: int, row_group: int) -> CropStore:
    """Write a store of `num` crops, in slides of 2,000; real crops are repeated."""
    crop_files.ROW_GROUP = row_group
    images = np.concatenate(list(crops.values()))
    images = images[np.random.default_rng(1).permutation(len(images))]
    slides = {}
    for first in range(0, num, 2000):
        index = np.arange(first, min(first + 2000, num))
        slide_id = f"s{first}"
        columns = {"cell_id": index, "nucleus_type": pa.repeat("nucleus", len(index))}
        cells = pa.table({"slide_id": pa.repeat(slide_id, len(index)), **columns})
        with Spool(len(index)) as spool:
            spool.add(np.arange(len(index)), images[index % len(images)])
            digest = spool.publish(file_uri(str(folder), "set", slide_id), cells, "")
            moments = vars(spool.colours)
        slides[slide_id] = {"num_crops": len(index), "digest": digest, "centre": moments}
    form = {"format_version": schemas.FORMAT_VERSION, "crop_um": schemas.STORED_CROP_UM}
    form |= {"crop_px": schemas.STORED_CROP_PX, "row_group": row_group}
    storage.publish_json(
        index_uri(str(folder)), form | {"set": "set", "slides": slides, "failed": {}}
    )
    return open_store([str(folder)])


def measure_row_groups(crops: dict[str, Images], num: int) -> list[dict[str, float]]:
    """Return crops/s of reading row groups in random order without decoding, by size of a group."""
    rows = []
    for size in (16, 32, 64, 128, 256, 512, 1024):
        with tempfile.TemporaryDirectory() as folder:
            store = write_store(Path(folder), crops, num, size)
            groups = [(f, g) for f in store.files for g in range(-(-f.num_crops // size))]
            groups = [groups[i] for i in np.random.default_rng(2).permutation(len(groups))]
            files = CropFiles()

            def read(
                files: CropFiles = files, groups: list[tuple[Any, int]] = groups
            ) -> list[Images]:
                tables = [files.read(file, [group], ["image"]) for file, group in groups]
                return [image for table in tables for image in image_bytes(table["image"])]

            images, rate = timed(read, num)
            size_bytes = float(np.mean([len(image) for image in images])) * size
            rows.append({"row_group": size, "bytes": size_bytes, "read_per_s": rate})
    return rows


def cpu_of_family() -> float:
    """Return the CPU seconds of this process and of its child processes that still run."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def rates(batches: Callable[[], Iterator[Any]], batch: int) -> dict[str, float]:
    """Consume an epoch of batches; return crops per second of wall time and of CPU time."""
    cpu, started, num, first_s = cpu_of_family(), time.perf_counter(), 0, 0.0
    for _ in batches():
        first_s = first_s or time.perf_counter() - started
        num += batch
    seconds, cpu = time.perf_counter() - started, cpu_of_family() - cpu
    return {"first_batch_s": first_s, "per_s": num / seconds, "per_cpu_s": num / cpu}


def ray_batches(store: CropStore, batch: int, split: int = 1) -> list[Iterator[Any]]:
    """Return the streams of Ray Data to `split` workers: decoded, shuffled in a seeded buffer."""
    import ray.data

    def decode(table: pa.Table) -> dict[str, NDArray[Any]]:
        out = np.empty((len(table), store.crop_px, store.crop_px, 3), np.uint8)
        decode_into(image_bytes(table["image"]), out)
        return {"image": out, "cell_id": table["cell_id"].to_numpy()}

    data = ray.data.read_parquet(
        [file.uri for file in store.files],
        columns=["image", "cell_id"],
        shuffle=ray.data.FileShuffleConfig(seed=0),
    ).map_batches(decode, batch_format="pyarrow", batch_size=1024)
    options: dict[str, Any] = {
        "local_shuffle_buffer_size": 8 * batch,
        "local_shuffle_seed": 0,
        "drop_last": True,
    }
    if split == 1:
        return [iter(data.iter_torch_batches(batch_size=batch, **options))]
    shards = data.streaming_split(split, equal=True)
    return [iter(s.iter_torch_batches(batch_size=batch // split, **options)) for s in shards]


def ray_order(store: CropStore, batch: int, split: int) -> list[list[int]]:
    """Return the ids of crops in each global batch, that of all workers at one step."""
    from concurrent.futures import ThreadPoolExecutor

    def ids(batches: Iterator[Any]) -> list[list[int]]:
        return [b["cell_id"].tolist() for b in batches]

    with ThreadPoolExecutor(split) as pool:
        parts = list(pool.map(ids, ray_batches(store, batch, split)))
    return [[cell for part in step for cell in part] for step in zip(*parts, strict=False)]


def shared(first: list[list[int]], second: list[list[int]]) -> float:
    """Return the share of crops that two runs have in the same global batch."""
    pairs = list(zip(first, second, strict=False))
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in pairs]))


def measure_training(store: CropStore, batch: int) -> dict[str, Any]:
    """Return rates of both ways to stream an epoch, and how far Ray Data repeats its order."""
    from ray.data import DataContext

    from scellst_ray.pipelines.session import ray_session

    order = CropOrder(store, batch, seed=0, threads=2)

    def ahead() -> Iterator[Any]:
        with prefetch(order.batches(0, 0, range(order.num_lanes)), depth=2) as batches:
            yield from batches

    found: dict[str, Any] = {"ours": rates(ahead, batch)}
    begun = time.perf_counter()
    next(order.batches(0, order.steps_per_epoch // 2, range(order.num_lanes)))
    found["ours"]["first_batch_in_the_middle_s"] = time.perf_counter() - begun
    context = DataContext.get_current()
    context.enable_progress_bars = False
    with ray_session(num_cpus=2):
        found["ray_data"] = rates(lambda: ray_batches(store, batch)[0], batch)
        for name, preserve in (("as_it_is", False), ("preserve_order", True)):
            context.execution_options.preserve_order = preserve
            runs = [ray_order(store, batch, split) for split in (2, 2, 1)]
            found["ray_data"][f"in_the_same_batch_{name}"] = {
                "again": shared(runs[0], runs[1]),
                "1_or_2_workers": shared(runs[0], runs[2]),
            }
    return found


def print_codecs(rows: dict[str, dict[str, Any]], names: list[str]) -> None:
    """Print the table of codecs."""
    print(f"{'codec':15}" + "".join(f"{n:>9}" for n in names) + "    mean  error  enc/s  dec/s")
    for codec, row in rows.items():
        sizes, error = list(row["bytes"].values()), np.mean(list(row["error"].values()))
        numbers = "".join(f"{size:9,.0f}" for size in sizes) + f"{np.mean(sizes):8,.0f}"
        speed = f"{row['encoded_per_s']:7,.0f}{row['decoded_per_s']:7,.0f}"
        print(f"{codec:15}{numbers}{error:7.2f}{speed}")


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--num", type=int, default=800, help="number of crops per slide")
    parser.add_argument("--crops", type=int, default=20_000, help="number of crops in the store")
    parser.add_argument("--batch", type=int, default=1024, help="global batch")
    parser.add_argument("--json", type=Path, default=Path("crop_formats.json"))
    options = parser.parse_args()
    cv2.setNumThreads(1)
    crops = real_crops(options.folder, options.num)
    rows = {f"raw, {c}": measure_raw(c, crops) for c in ("none", "zstd", "lz4")}
    rows |= {name: measure_codec(name, crops) for name in CODECS}
    print_codecs(rows, list(crops))
    groups = measure_row_groups(crops, options.crops)
    for row in groups:
        size, read = f"{row['bytes']:9,.0f} B", f"{row['read_per_s']:9,.0f} crops/s read"
        print(f"row group of {row['row_group']:5.0f}: {size}, {read}")
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder), crops, options.crops, 128)
        training = measure_training(store, options.batch)
    print(json.dumps(training, indent=2))
    report = {
        "crops": {name: len(images) for name, images in crops.items()},
        "codecs": rows,
        "row_groups": groups,
        "training": training,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {n: version(n) for n in ("opencv-python-headless", "pyarrow", "ray", "numpy")},
    }
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
