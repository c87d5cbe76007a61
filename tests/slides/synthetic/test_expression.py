import numpy as np

from scellst_ray.slides.synthetic import slide as synthetic
from scellst_ray.slides.synthetic.config import SyntheticConfig
from scellst_ray.slides.synthetic.expression import draw_programme


def test_expression_follows_what_can_be_seen():
    tissue = synthetic.make_tissue(SyntheticConfig(seed=1, width_um=1200.0, height_um=1200.0))
    nuclei, programme = tissue.layout.nuclei, tissue.programme
    one_hot = np.eye(4)[nuclei.type_index]
    visible = np.concatenate(
        [one_hot, one_hot * np.log(nuclei.area_um2)[:, None], one_hot * nuclei.stain[:, None]],
        axis=1,
    )
    fitted = visible @ np.linalg.lstsq(visible, tissue.expected_NG, rcond=None)[0]
    varying = [g for g, role in enumerate(programme.roles) if role != "constant"]
    unexplained = (tissue.expected_NG - fitted).var(axis=0) / tissue.expected_NG.var(axis=0)
    assert (1 - unexplained)[varying].min() > 0.7
    constant = programme.gene_names.index("ACTB")
    assert np.ptp(tissue.expected_NG[:, constant]) == 0
    by_type = [
        tissue.expected_NG[nuclei.type_index == k, programme.gene_names.index("COL1A1")].mean()
        for k in range(4)
    ]
    assert np.argmax(by_type) == 2
    proliferation = tissue.expected_NG[:, programme.gene_names.index("MKI67")]
    neoplastic = nuclei.type_index == 0
    assert np.corrcoef(np.log(proliferation[neoplastic]), nuclei.area_um2[neoplastic])[0, 1] > 0.5
    # Counts are draws around the rates: their mean is rate x E[library] = rate x exp(sd^2 / 2).
    ratio = tissue.counts_NG.mean(axis=0) / tissue.expected_NG.mean(axis=0)
    np.testing.assert_allclose(ratio, np.exp(0.2**2 / 2), rtol=0.08)


def test_programmes_of_different_lengths_agree():
    short, long = draw_programme(9, 3), draw_programme(64, 3)
    assert long.gene_names[:9] == short.gene_names
    np.testing.assert_array_equal(long.log_rate_TG[:, :9], short.log_rate_TG)
    assert len(set(long.gene_names)) == 64
    assert long.gene_names[-1] == "GENE64"
