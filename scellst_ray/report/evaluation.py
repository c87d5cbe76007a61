"""Tables from the file that `evaluate expression` writes."""

from typing import Any

from scellst_ray import storage
from scellst_ray.report.views import Table
from scellst_ray.report.words import as_text

NAMES = {
    "pcc": "PCC",
    "pcc_given_depth": "PCC given depth",
    "scc": "SCC",
    "rmse": "rMSE",
    "mae": "MAE",
}
OURS = "ours"
# Genes of a table by gene, besides those that are shown anyway: the best and the worst.
NUM_BEST = 10


def read_evaluation(uri: str) -> dict[str, Any]:
    """Read the file of `evaluate expression`.

    Raises:
        ValueError: it is another file.
        FileNotFoundError: it is absent.
    """
    try:
        found = storage.read_json(uri)
    except FileNotFoundError as error:
        message = f"{uri}: no such file; give the --out of `scellst-ray evaluate expression`"
        raise FileNotFoundError(message) from error
    except ValueError as error:
        message = f"{uri}: no JSON ({error}); give the --out of `scellst-ray evaluate expression`"
        raise ValueError(message) from error
    slides = found.get("slides") if isinstance(found, dict) else None
    if not isinstance(slides, dict) or not all(map(_is_sound, slides.values())):
        message = f"{uri}: holds no scores; give the --out of `scellst-ray evaluate expression`"
        raise ValueError(message)
    return dict(found)


def _is_sound(levels: object) -> bool:
    """Return whether the levels of a slide are as `evaluate expression` writes them."""
    if not isinstance(levels, dict):
        return False
    return all(
        isinstance(part, dict)
        and isinstance(part.get("models"), dict)
        and _are_by_gene(part.get("by_gene", {}))
        for part in levels.values()
    )


def _are_by_gene(by_gene: object) -> bool:
    """Return whether each metric of each model has one number or None for each gene."""
    if not isinstance(by_gene, dict):
        return False
    genes, scores = by_gene.get("gene", []), [v for k, v in by_gene.items() if k != "gene"]
    if not isinstance(genes, list) or not all(isinstance(gene, str) for gene in genes):
        return False
    return all(isinstance(model, dict) for model in scores) and all(
        isinstance(values, list)
        and len(values) == len(genes)
        and all(each is None or type(each) in {int, float} for each in values)
        for model in scores
        for values in model.values()
    )


def slide_tables(evaluation: dict[str, Any] | None, slide_id: str, genes: list[str]) -> list[Table]:
    """Return the scores of a slide: means over genes of each model, and ours by gene."""
    tables = []
    for level, part in ((evaluation or {}).get("slides", {}).get(slide_id) or {}).items():
        metrics = [m for m in NAMES if any(m in scores for scores in part["models"].values())]
        rows = [
            [name, *[_mean(scores.get(metric)) for metric in metrics]]
            for name, scores in part["models"].items()
        ]
        about = f"{level}: means over {part.get('genes', '?')} genes, 95 % intervals in brackets"
        tables.append(Table(["model", *[NAMES[m] for m in metrics]], rows, about))
        tables += _by_gene(part.get("by_gene", {}), genes, level)
    return tables


def _by_gene(by_gene: dict[str, Any], genes: list[str], level: str) -> list[Table]:
    """Return the PCC of every model: of the shown genes, and of our best and worst ones."""
    names = by_gene.get("gene") or []
    models = [m for m, scores in by_gene.items() if m != "gene" and "pcc" in scores]
    if OURS not in models:
        return []
    ours = dict(zip(names, by_gene[OURS]["pcc"], strict=True))
    order = sorted((g for g in names if ours[g] is not None), key=lambda g: (-ours[g], g))
    few = len(order) <= 2 * NUM_BEST
    best = order if few else [*order[:NUM_BEST], *order[-NUM_BEST:]]
    shown = [*[g for g in genes if g in ours and g not in best], *best]
    place = {gene: row for row, gene in enumerate(names)}
    rows = [[g, *[as_text(by_gene[m]["pcc"][place[g]]) for m in models]] for g in shown]
    which = "all genes" if few else f"the shown genes, our {NUM_BEST} best and {NUM_BEST} worst"
    return [Table(["gene", *models], rows, f"{level}: PCC by gene, {which}")]


def cohort_tables(evaluation: dict[str, Any] | None) -> list[Table]:
    """Return the means over slides of each level and model."""
    tables = []
    for level, models in ((evaluation or {}).get("all") or {}).items():
        metrics = [m for m in NAMES if any(m in scores for scores in models.values())]
        rows = [
            [name, *[as_text(scores.get(m)) for m in metrics]] for name, scores in models.items()
        ]
        about = f"{level}: means over slides of the means over genes"
        tables.append(Table(["model", *[NAMES[m] for m in metrics]], rows, about))
    return tables


def _mean(score: dict[str, Any] | None) -> str:
    if not score or score.get("mean") is None:
        return "-"
    if "over_rows" not in score:
        return as_text(score["mean"])
    low, high = score["over_rows"]
    return f"{as_text(score['mean'])} [{as_text(low)}, {as_text(high)}]"
