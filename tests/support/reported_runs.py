"""Runs to report on: exported_runs with thumbnails, and slides that are empty or failed."""

import numpy as np

from scellst_ray import storage
from scellst_ray.runs.reading import open_run
from scellst_ray.runs.thumbnails import publish_thumbnail
from tests.support.exported_runs import HEIGHT0, WIDTH0, add_slide, make_run
from tests.support.run_folders import record

ODD = "<b>&\"'</b>"


def stained(seed):
    """Return a picture of a pink slide with dark discs, RGB uint8."""
    rows, columns = np.mgrid[: HEIGHT0 // 2, : WIDTH0 // 2]
    x, y = np.random.default_rng(seed).uniform(20, 180, 2)
    inside = np.hypot(columns - x, rows - y) < 15 + 5 * seed
    return np.where(inside[..., None], (90, 40, 120), (230, 180, 210)).astype(np.uint8)


def make_reported_run(tmp_path, *, head=True):
    """Return a run with slides a and b (done), e (empty), f (failed) and p (partial)."""
    run = make_run(tmp_path, head=head)
    add_slide(run.folder, "p", 25, embedding=not head, hidden=head, missing_tiles=2)
    add_slide(run.folder, "e", 0, embedding=not head, hidden=head)
    failed = record("f", "failed", num_tiles=0, stage="plan", error_type="ValueError")
    failed |= {"error": f"/data/{ODD}.svs: no such file"}
    storage.publish_json(run.folder.record_uri("f"), failed)
    for seed, slide_id in enumerate("abp"):
        origin = {"slide_id": slide_id, "source": None, "ratio": 2.0}
        publish_thumbnail(run.folder.thumbnail_uri(slide_id), stained(seed), origin)
    return open_run(run.uri)


def write_spots(folder, genes, *, seed=0):
    """Write spots of slide a as an ST array, and a manifest of slides a and b; return its path."""
    rng = np.random.default_rng(seed)
    places = [(x, y) for x in range(1, 6) for y in range(1, 5)]
    lines = ["\t".join(["", *genes, "OTHER"])]
    where = ["x\ty\tpixel_x\tpixel_y\tselected"]
    for x, y in places:
        counts = rng.poisson([*np.linspace(2, 9, len(genes)), 40])
        lines.append("\t".join([f"{x}x{y}", *map(str, counts)]))
        where.append(f"{x}\t{y}\t{x * 100}\t{y * 80}\t1")
    (folder / "a.tsv").write_text("\n".join(lines) + "\n")
    (folder / "a_positions.tsv").write_text("\n".join(where) + "\n")
    manifest = folder / "spots.csv"
    manifest.write_text(
        "slide_id,uri,mpp,mpp_confirmed,spots,spot_positions,spot_diameter_um\n"
        "a,a.png,0.5,yes,a.tsv,a_positions.tsv,45\nb,b.png,0.5,,,,\n"
    )
    return str(manifest)
