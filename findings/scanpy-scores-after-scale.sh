#!/usr/bin/env bash
# scanpy 1.11.5: after `pp.scale` the same cells in another order get other scores from
# `tl.score_genes`. Control genes are chosen in bins of the genes' means, and after scaling all means
# are rounding noise (below 1e-6), which depends on the order of the sum. Without `pp.scale` the
# scores are equal bit for bit. Analyses that scale first, as the sCellST paper's does, cannot be
# repeated from reordered or concatenated cells. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet \
  scanpy==1.11.5 anndata==0.12.19 'pandas<3'
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import anndata
import numpy as np
import scanpy as sc

rng = np.random.default_rng(0)
mean = rng.gamma(1, 1, 250)
values = np.log1p(rng.gamma(2, mean / 2, (3000, 250))).astype(np.float32)
order = rng.permutation(3000)
genes = [f"g{n}" for n in range(250)]


def scores(matrix, scale):
    data = anndata.AnnData(matrix.copy())
    data.var_names = genes
    if scale:
        sc.pp.scale(data)
        assert np.abs(data.X.mean(axis=0)).max() < 1e-6
    sc.tl.score_genes(data, genes[:20], random_state=0)
    return data.obs["score"].to_numpy()


for scale in (False, True):
    one, two = scores(values, scale)[order], scores(values[order], scale)
    largest = float(np.abs(one - two).max())
    correlation = float(np.corrcoef(one, two)[0, 1])
    print("scanpy", sc.__version__, "scaled" if scale else "not scaled", "largest difference",
          round(largest, 3), "correlation", round(correlation, 3), "sd", round(float(one.std()), 3))
    assert (largest > 0.05) == scale, "the order of cells matters otherwise than before"
PY
