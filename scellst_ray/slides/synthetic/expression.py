"""Expression of the cells of a synthetic slide: by type, visible shape and a little unseen noise.

The programme is the table of what each gene depends on. It has a seed of its own, so slides of one
patient share it while their tissues differ. T: types, N: cells, G: genes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scellst_ray.slides.synthetic.config import SyntheticConfig
from scellst_ray.slides.synthetic.layout import SyntheticNuclei

# A panel takes these roles in turn: markers of the four types, genes that grow with nuclear area,
# genes that grow with staining, and genes that depend on nothing.
_ROLES = ("Neoplastic", "Inflammatory", "Connective", "Epithelial", "area", "stain", "constant")
_NAMES = {
    "Neoplastic": ("EPCAM", "ERBB2", "KRT18", "MUC1", "CD24"),
    "Inflammatory": ("PTPRC", "CD3E", "CD79A", "CD68", "CXCR4"),
    "Connective": ("COL1A1", "VIM", "ACTA2", "DCN", "FN1"),
    "Epithelial": ("KRT8", "CDH1", "KRT19", "CLDN4", "TFF1"),
    "area": ("MKI67", "TOP2A", "PCNA", "CCNB1"),
    "stain": ("HIST1H4C", "H2AFZ", "HMGB2"),
    "constant": ("ACTB", "GAPDH", "B2M"),
}
_TYPICAL_AREA_UM2 = 55.0


@dataclass(frozen=True)
class GeneProgramme:
    """Dependence of each gene's log rate on the visible features of a nucleus.

    Attributes:
        gene_names: Unique names, in the panel's order.
        roles: Role of each gene: a nucleus type, "area", "stain" or "constant".
        log_rate_TG: Log rate by type at typical area and staining, float64 [4, G].
        area_slope_G: Change of the log rate per factor e^0.5 of nuclear area, float64 [G].
        stain_slope_G: Change of the log rate per standard deviation of staining, float64 [G].
    """

    gene_names: tuple[str, ...]
    roles: tuple[str, ...]
    log_rate_TG: NDArray[np.float64]
    area_slope_G: NDArray[np.float64]
    stain_slope_G: NDArray[np.float64]


def draw_programme(num_genes: int, programme_seed: int) -> GeneProgramme:
    """Return a random programme. The first genes of a longer panel equal a shorter panel."""
    names, roles = _panel(num_genes)
    log_rate = np.empty((4, num_genes))
    area_slope, stain_slope = np.zeros(num_genes), np.zeros(num_genes)
    for g, role in enumerate(roles):
        rng = np.random.default_rng([programme_seed, g])
        log_rate[:, g] = np.log(rng.uniform(0.5, 1.5)) + rng.normal(0, 0.2, 4)
        area_slope[g], stain_slope[g] = rng.normal(0, 0.08, 2)
        strength = rng.uniform(0.8, 1.2)
        if role in _ROLES[:4]:
            log_rate[_ROLES.index(role), g] += 2.0 * strength
        elif role == "area":
            area_slope[g] += 0.8 * strength
        elif role == "stain":
            stain_slope[g] += 0.5 * strength
        else:
            log_rate[:, g] = np.log(3.0 * strength)
            area_slope[g] = stain_slope[g] = 0.0
    return GeneProgramme(names, roles, log_rate, area_slope, stain_slope)


def expected_rates(
    config: SyntheticConfig, programme: GeneProgramme, nuclei: SyntheticNuclei
) -> NDArray[np.float32]:
    """Return the expected molecules per cell and gene, float32 [N, G], before library size."""
    area_N = np.log(nuclei.area_um2 / _TYPICAL_AREA_UM2) / 0.5
    stain_N = np.log(nuclei.stain) / 0.13
    log_rate_NG = programme.log_rate_TG[nuclei.type_index]
    log_rate_NG = log_rate_NG + area_N[:, None] * programme.area_slope_G
    log_rate_NG += stain_N[:, None] * programme.stain_slope_G
    unseen = config.stream("unseen").standard_normal(log_rate_NG.shape)
    varying = np.array([role != "constant" for role in programme.roles])
    return np.asarray(np.exp(log_rate_NG + config.unseen_sd * unseen * varying), np.float32)


def draw_counts(config: SyntheticConfig, expected_NG: NDArray[np.float32]) -> NDArray[np.int32]:
    """Draw each cell's molecules, int32 [N, G]: negative binomial with a library size per cell."""
    rng = config.stream("counts")
    library_N = np.exp(rng.normal(0, config.library_sd, len(expected_NG)))
    shape = config.dispersion
    rate_NG = library_N[:, None] * rng.gamma(shape, 1 / shape, expected_NG.shape) * expected_NG
    return rng.poisson(rate_NG).astype(np.int32)


def _panel(num_genes: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return names and roles: real gene names, one of each role in turn, then GENE<n>."""
    known = [
        (_NAMES[role][turn], role)
        for turn in range(max(map(len, _NAMES.values())))
        for role in _ROLES
        if turn < len(_NAMES[role])
    ]
    further = [(f"GENE{g + 1}", _ROLES[g % len(_ROLES)]) for g in range(len(known), num_genes)]
    names, roles = zip(*(known + further)[:num_genes], strict=True)
    return names, roles
