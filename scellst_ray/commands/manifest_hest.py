"""The command `manifest hest`: a folder in the HEST layout to a manifest."""

import io

import polars as pl

from scellst_ray import storage
from scellst_ray.commands.configs import ManifestHestConfig
from scellst_ray.commands.reports import line_printer
from scellst_ray.spots.hest import read_hest


def write_hest_manifest(config: ManifestHestConfig) -> int:
    """Write the manifest; print contradictions between the files and the samples left out.

    Raises:
        ValueError: the folder holds no complete sample, or `out` exists.
    """
    out = storage.absolute(config.out)
    if storage.exists(out):
        message = f"{out}: there is a file already; give another --out"
        raise ValueError(message)
    samples, left_out = read_hest(storage.absolute(config.folder))
    rows = [sample.row | {"conflicts": "; ".join(sample.conflicts)} for sample in samples]
    text = io.StringIO()
    pl.DataFrame(rows, infer_schema_length=None, strict=False).write_csv(text)
    storage.publish_text(out, text.getvalue())
    lines = [f"{s.row['slide_id']}: {conflict}" for s in samples for conflict in s.conflicts]
    lines += [f"left out {reason}" for reason in left_out]
    lines.append(f"wrote {out}: {len(samples)} slides")
    say = line_printer()
    for line in lines:
        say(line)
    return 0
