"""Facts about a run and its slides, in words."""

from collections.abc import Iterable, Mapping

from scellst_ray.core.version import __version__
from scellst_ray.report.views import Scale
from scellst_ray.runs.reading import Run
from scellst_ray.runs.records import SlideRecord
from scellst_ray.runs.scores import ScoresInfo
from scellst_ray.storage.credentials import redact

# Lengths that a scale bar may have, um.
BARS_UM = (100, 200, 500, 1000, 2000, 5000, 10_000)
# Parts of a run's identity that a report states, and what they are called there.
STATED = {
    "segmenter": "segmenter",
    "segmenter_weights": "weights of the segmenter",
    "encoder": "encoder",
    "head": "head",
    "precision": "precision",
}


def as_text(value: float | None) -> str:
    """Return a number to three digits, thousands separated; '-' for none."""
    if value is None or value != value:  # noqa: PLR0124 - NaN is not itself
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def scale_of(limits: tuple[float, float], unit: str) -> Scale:
    """Return the scale of a map's colours."""
    return Scale(as_text(limits[0]), as_text(limits[1]), unit)


def unit_of(run: Run, *, short: bool = False) -> str:
    """Return the unit of a run's expression in words."""
    if run.last_layer.formula.counts:
        return "counts" if short else "counts of a spot in which all cells are like this one"
    if short:
        return "scaled log counts"
    return (
        "log(1 + counts per 10,000), divided by the gene's scale on its training slide: compare "
        "cells within a gene, not genes with each other"
    )


def slide_facts(run: Run, record: SlideRecord) -> list[tuple[str, str]]:
    """Return names and values for the head of a slide's page."""
    facts = [("status", record["status"]), ("cells", f"{record['num_cells']:,}")]
    mpp, width0, height0 = record.get("mpp"), record.get("width0"), record.get("height0")
    if mpp and width0 and height0:
        width_mm, height_mm = (side * mpp / 1000 for side in (width0, height0))
        facts.append(("size", f"{width_mm:.1f} x {height_mm:.1f} mm"))
        facts.append(("resolution", f"{mpp:.4g} um/px"))
        density = record["num_cells"] / (width_mm * height_mm)
        facts.append(("cells a mm2 of the slide", as_text(density)))
    tiles = f"{record['num_tiles']:,}"
    if record.get("num_failed_tiles"):
        tiles += f", of which {record['num_failed_tiles']:,} failed"
    facts.append(("tiles", tiles))
    source = run.sources.get(record["slide_id"])
    if source is not None:
        facts.append(("file", redact(source["uri"]).rstrip("/").rsplit("/", 1)[-1]))
    return facts


def describe_shift(record: SlideRecord) -> tuple[str, bool]:
    """Return domain shift in words, and whether it is beyond the limit."""
    shift = record.get("domain_shift")
    if shift is None:
        return "", False
    score, limit = shift["score"], shift["limit"]
    begin = f"Domain shift: score {score:.2f}. A cell like those of the training has about 1."
    if limit is None:
        return f"{begin} The head states no limit, so whether this is far is not known.", False
    if shift["beyond"]:
        text = (
            f"{begin} The cells look unlike those that the head was trained on: no training slide "
            f"that was left out scored above {limit:.2f}. Check stain and resolution before you "
            "trust the expression."
        )
        return text, True
    text = (
        f"{begin} The cells look like those that the head was trained on: training slides that "
        f"were left out scored up to {limit:.2f}."
    )
    return text, False


def versions_of(run: Run, record: SlideRecord | None = None) -> list[tuple[str, str]]:
    """Return what made a run, or a slide of it."""
    identity: Mapping[str, object] = {**run.info.get("identity", {})}
    found = [("report", f"scellst_ray {__version__}")]
    if record is not None and record.get("scellst_ray"):
        found.append(("slide", f"scellst_ray {record['scellst_ray']}"))
        found.append(("finished", str(record.get("finished", "-"))))
    found.append(("run", run.info["digest"]))
    found += [
        (name, redact(str(identity[key]))) for key, name in STATED.items() if identity.get(key)
    ]
    found += sorted(run.info.get("libraries", {}).items())
    return found


def describe_scores(info: ScoresInfo | None) -> str:
    """Return where scores of types come from and how they are computed, in words."""
    if info is None:
        return ""
    lacking = sum(bool(each["missing"]) for each in info["types"])
    text = f"{len(info['types'])} types by {info.get('source', 'markers')}. "
    text += f"Score: {info['formula']}."
    if lacking:
        text += f" Of {lacking} of them the run's panel lacks some markers."
    if agreement := info.get("agreement"):
        recalls = (f"{name} {share:.2f}" for name, share in sorted(agreement["recall"].items()))
        text += (
            f" Over all slides, balanced accuracy against nucleus types is "
            f"{agreement['balanced_accuracy']:.2f} (chance {agreement['chance']:.2f}), with recall "
            f"{', '.join(recalls)}."
        )
    return text


def scale_bar(record: SlideRecord) -> tuple[float, str] | None:
    """Return the share of a slide's width that a scale bar takes, in percent, and its text."""
    mpp, width0 = record.get("mpp"), record.get("width0")
    if not mpp or not width0:
        return None
    width_um = mpp * width0
    fitting = [bar for bar in BARS_UM if bar <= width_um / 3]
    length = max(fitting, default=BARS_UM[0])
    text = f"{length} um" if length < 1000 else f"{length // 1000} mm"
    return min(100.0, 100 * length / width_um), text


def names_in_short(names: Iterable[str], at_most: int = 10) -> str:
    """Return names as a list, the first ones if there are many."""
    names = list(names)
    return ", ".join(names[:at_most]) + (" ..." if len(names) > at_most else "")
