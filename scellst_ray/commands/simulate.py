"""The report of `simulate`: tables on the console and as Markdown, JSON, all genes, a figure."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from scellst_ray import storage
from scellst_ray.commands.reports import framed_table, line_printer, markdown_table
from scellst_ray.evaluation.maps import new_figure
from scellst_ray.evaluation.simulation.cells import SCENARIOS
from scellst_ray.evaluation.simulation.config import SimulateConfig
from scellst_ray.evaluation.simulation.study import CONDITION, PANELS, simulate

# Bars of a group, from the inputs and supervision that know most to those that know least.
BARS = {
    ("one-hot", "supervised"): "#4a1486",
    ("one-hot", "mil"): "#807dba",
    ("ssl", "supervised"): "#005a32",
    ("ssl", "mil"): "#74c476",
}
TITLES = {"hvg": "variable genes", "markers": "marker genes"}
HEADINGS = (*CONDITION, "PCC of cells", "95 % interval", "PCC of spots", "rate", "epochs")
NOTES = """\
PCC is the Pearson correlation of predicted and true log-normalised expression over the test cells.
It is computed by gene, then averaged over genes. The interval is a bootstrap over genes. A gene
that is constant over the test cells has no PCC and is left out. A constant prediction counts as 0.

Half of the image cells and half of the reference cells serve training, the other halves testing. No
cell is on both sides. Validation spots are built from training cells of their own. They choose the
learning rate (rates that are worse after some epochs are dropped) and the epoch. Test cells choose
nothing. Panels are chosen on training cells of the reference. A spot's counts are added up and then
normalised, as in the paper. The published code adds log-normalised values and chooses the rate on
the test set. Targets are not scaled, as published. One-hot inputs are the cluster of a cell, which
is all that a perfect encoder could know. `supervised` is the same network, trained on the
expression of every training cell.
"""


def run_simulate(config: SimulateConfig) -> int:
    """Run `simulate`: print its table, write the report, the figure and the genes; return 0."""
    console, started = Console(), time.monotonic()
    say = line_printer(console)
    report = simulate(config, say)
    for name in ("seconds", "cpu_seconds"):
        report[name] = sum(case[name] for case in report["conditions"])
    report["seconds_of_this_command"] = time.monotonic() - started
    report["peak_memory_bytes"] = peak_memory_bytes()
    report["findings"] = findings(report["conditions"])
    console.print(_table(report["conditions"]))
    for line in report["findings"]:
        say(line)
    write_report(config.out, report)
    for name in ("report.md", "report.json", "simulation.png", "genes.parquet"):
        say(f"  {storage.join(config.out, name)}")
    return 0


def peak_memory_bytes() -> int:
    """Return the peak of this process's memory in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_report(out: str, report: dict[str, Any]) -> None:
    """Write report.json, report.md, simulation.png and genes.parquet below a folder."""
    genes = genes_table(report)
    slim = [
        {name: value for name, value in case.items() if name != "pearson_by_gene"}
        for case in report["conditions"]
    ]
    storage.publish_json(storage.join(out, "report.json"), report | {"conditions": slim})
    storage.publish_table(storage.join(out, "genes.parquet"), genes.to_arrow())
    storage.publish_text(storage.join(out, "report.md"), markdown(report))
    storage.publish(
        storage.join(out, "simulation.png"), lambda path: draw(path, report["conditions"])
    )


def genes_table(report: dict[str, Any]) -> pl.DataFrame:
    """Return one row per condition and gene: the condition, gene, pearson (null if undefined)."""
    frames = []
    for case in report["conditions"]:
        columns = {
            "gene": report["panels"][case["panel"]],
            "pearson": case["pearson_by_gene"],
        }
        frame = pl.DataFrame(columns, schema={"gene": pl.String, "pearson": pl.Float64})
        frames.append(frame.select(*(pl.lit(case[n]).alias(n) for n in CONDITION), pl.all()))
    return pl.concat(frames)


def by_condition(conditions: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return conditions by (panel, scenario, inputs, supervision)."""
    return {tuple(case[name] for name in CONDITION): case for case in conditions}


def findings(conditions: Sequence[dict[str, Any]]) -> list[str]:
    """Return the results of the paper's comparisons, one line each per panel."""
    pearson = {key: case["pearson"] for key, case in by_condition(conditions).items()}
    lines = []
    for panel in PANELS:
        name = TITLES[panel]
        chance = max(abs(r) for key, r in pearson.items() if key[:2] == (panel, "random"))
        lines.append(f"{name}, random: |PCC| at most {chance:.3f}, where nothing can be learnt")
        exact = pearson[panel, "centroid", "ssl", "mil"]
        lines.append(f"{name}, centroid: PCC {exact:.3f} from spots and embeddings")
        mil, full = (pearson[panel, "cell", "ssl", s] for s in ("mil", "supervised"))
        lines.append(
            f"{name}, cell: PCC {mil:.3f} from spots, {full:.3f} from cells "
            f"(supervised {full - mil:+.3f})"
        )
        hot = pearson[panel, "cell", "one-hot", "mil"]
        lines.append(
            f"{name}, cell: one-hot {hot:.3f}, embeddings {mil:.3f} (one-hot {hot - mil:+.3f})"
        )
    return lines


def _rows(conditions: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            *(case[name] for name in CONDITION),
            f"{case['pearson']:.3f}",
            f"{case['pearson_low']:.3f} to {case['pearson_high']:.3f}",
            f"{case['spot_pearson']:.3f}",
            f"{case['learning_rate']:g}",
            str(case["num_epochs"]),
        ]
        for case in conditions
    ]


def _table(conditions: Sequence[dict[str, Any]]) -> Table:
    """Return the bars as a table that fits a narrow console."""
    by_name = by_condition(conditions)
    title = "Pearson correlation of test cells, mean over genes (95 % interval)"
    headings = ("panel", "scenario", *(" ".join(bar) for bar in BARS))
    rows = []
    for panel, scenario in product(PANELS, SCENARIOS):
        bars = [by_name[panel, scenario, *bar] for bar in BARS]
        texts = [
            f"{bar['pearson']:.3f}\n({bar['pearson_low']:.2f} {bar['pearson_high']:.2f})"
            for bar in bars
        ]
        rows.append((panel, scenario, *texts))
    return framed_table(headings, rows, title)


def markdown(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = ["# Simulation study", ""]
    lines += [f"- {line}" for line in report["findings"]]
    lines += ["", "![Pearson correlation by scenario](simulation.png)", ""]
    lines += [f"- {line}" for line in _settings(report)]
    lines += ["", *markdown_table(HEADINGS, _rows(report["conditions"]))]
    lines += ["", NOTES]
    if "nucleus_types" in report["image"]:
        lines += ["Nucleus types of the clusters, in their order:", ""]
        for shares in report["image"]["nucleus_types"]:
            most = sorted(shares.items(), key=lambda item: -item[1])
            lines.append("- " + ", ".join(f"{name} {share:.0%}" for name, share in most))
        lines.append("")
    return "\n".join(lines)


def _settings(report: dict[str, Any]) -> Iterator[str]:
    """Yield the settings and the data of the study, one line each."""
    image, reference, config = report["image"], report["reference"], report["config"]
    yield (
        f"Image cells: {image['source']}; {image['num_cells_clustered']:,} clustered by their "
        f"embeddings of length {image['embedding_dim']:,}, the {image['cells_per_cluster']:,} "
        f"nearest to each of {config['num_types']} centroids kept."
    )
    types = ", ".join(f"{name} ({size:,})" for name, size in reference["types"].items())
    yield (
        f"Reference: {reference['source']}; {reference['num_cells']:,} cells, "
        f"{reference['num_genes']:,} genes, median of {reference['median_library']:,.0f} counts; "
        f"types in the order of the clusters: {types}."
    )
    yield (
        f"Spots: {config['num_spots']:,} for training and as many for testing, of "
        f"{config['cells_per_spot']} cells drawn with replacement."
    )
    panels = [f"{len(genes):,} {TITLES[name]}" for name, genes in report["panels"].items()]
    yield f"Panels: {', '.join(panels)}."
    yield (
        f"{report['seconds'] / 60:.1f} minutes of fitting "
        f"({report['cpu_seconds'] / 60:.1f} minutes of CPU time), at most "
        f"{report['peak_memory_bytes'] / 2**30:.1f} GiB; network: {config['predictor']}; "
        f"scellst_ray {report['scellst_ray']}."
    )


def draw(path: Path, conditions: Sequence[dict[str, Any]]) -> None:
    """Draw the bars as a PNG: one axis for each panel of genes, scenarios as groups."""
    by_name = by_condition(conditions)
    figure = new_figure(10.5, 4.2)
    axes = list(figure.subplots(1, len(PANELS), sharey=True))
    width = 0.8 / len(BARS)
    for axis, panel in zip(axes, PANELS, strict=True):
        for turn, ((inputs, supervision), colour) in enumerate(BARS.items()):
            bars = [by_name[panel, scenario, inputs, supervision] for scenario in SCENARIOS]
            height = np.array([bar["pearson"] for bar in bars])
            below = height - [bar["pearson_low"] for bar in bars]
            above = [bar["pearson_high"] for bar in bars] - height
            place = np.arange(len(SCENARIOS)) + (turn - (len(BARS) - 1) / 2) * width
            axis.bar(
                place,
                height,
                width * 0.92,
                yerr=np.maximum([below, above], 0),
                color=colour,
                error_kw={"elinewidth": 0.8, "capsize": 1.5},
                label=f"{inputs}, {supervision}",
            )
            for x, y, top in zip(place, height, height + above, strict=True):
                style = {"textcoords": "offset points", "ha": "center", "fontsize": 6.5}
                # Adding 0 after rounding makes -0.00 a plain 0.00.
                axis.annotate(f"{round(y, 2) + 0:.2f}", (x, max(top, 0)), (0, 3), **style)
        axis.axhline(0, color="black", linewidth=0.6)
        genes = max(
            by_name[panel, scenario, *bar]["num_genes"] for scenario in SCENARIOS for bar in BARS
        )
        axis.set_title(f"{TITLES[panel]} ({genes:,})")
        axis.set_xticks(range(len(SCENARIOS)), SCENARIOS)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("Pearson correlation over test cells,\nmean over genes")
    low = min(0.0, *(bar["pearson_low"] for bar in by_name.values()))
    axes[0].set_ylim(low - 0.05 * (low < -0.01), 1.12)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(BARS), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, format="png")
