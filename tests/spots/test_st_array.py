import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scellst_ray.spots.read import read_spots
from scellst_ray.spots.st_array import read_st_array
from tests.support.paths import SHARED

HER2ST = SHARED / "data" / "st_her2st"
COUNTS = "\tEPCAM\tKRT8\tKRT8\n10x21\t1\t0\t2\n9x4\t0\t5\t0\n3x3\t1\t1\t1\n"
POSITIONS = (
    "x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected\n"
    "9\t4\t9.1\t4.1\t900.5\t40.25\t1\n"
    "10\t21\t9.9\t21.0\t1000.5\t210\t1\n"
    "3\t3\t3\t3\t300\t30\t0\n"
)


def write(tmp_path, counts=COUNTS, positions=POSITIONS, *, zipped=False):
    counts_path = tmp_path / ("c.tsv.gz" if zipped else "c.tsv")
    counts_path.write_bytes(gzip.compress(counts.encode()) if zipped else counts.encode())
    (tmp_path / "p.tsv").write_text(positions)
    return str(counts_path), str(tmp_path / "p.tsv")


@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("corner", [True, False], ids=["corner cell", "no corner cell"])
def test_reads_selected_spots(tmp_path, zipped, corner):
    counts = COUNTS if corner else COUNTS.removeprefix("\t")
    spots = read_st_array(*write(tmp_path, counts, zipped=zipped), mpp=0.5)
    assert spots.spot_id.tolist() == ["10x21", "9x4"]
    assert spots.xy0.tolist() == [[1000.5, 210], [900.5, 40.25]]
    assert spots.counts.toarray().tolist() == [[1, 0, 2], [0, 5, 0]]
    assert spots.genes == ["EPCAM", "KRT8", "KRT8-1"]
    assert spots.radius0 == 100.0


def test_without_selected_column_every_spot_counts(tmp_path):
    positions = "\n".join("\t".join(line.split("\t")[:6]) for line in POSITIONS.splitlines())
    assert len(read_st_array(*write(tmp_path, positions=positions), mpp=0.5)) == 3


@pytest.mark.parametrize(
    ("counts", "positions", "words"),
    [
        ("\t10x21\t9x4\nEPCAM\t1\t0\n", POSITIONS, "transpose"),
        (COUNTS.replace("5", "-5"), POSITIONS, "-5.0 for gene KRT8 in spot 9x4"),
        (COUNTS.replace("5", "many"), POSITIONS, "not a table of counts"),
        (COUNTS.replace("\t5\t0\n", "\t5\n"), POSITIONS, "nan for gene KRT8-1 in spot 9x4"),
        ("\tEPCAM\n10x21\t0\n9x4\t0\n", POSITIONS, "no counts at all"),
        ("", POSITIONS, "not a table of counts"),
        (COUNTS, "x\ty\n1\t2\n", r"\['pixel_x', 'pixel_y'\] missing"),
        (COUNTS, POSITIONS.replace("900.5", "left"), "not a number"),
        (
            COUNTS,
            POSITIONS.replace("10\t21", "10\t22").replace("9\t4", "9\t5"),
            "no spot id occurs",
        ),
    ],
)
def test_unsound_files_are_refused(tmp_path, counts, positions, words):
    with pytest.raises(ValueError, match=words):
        read_st_array(*write(tmp_path, counts, positions), mpp=0.5)


def test_missing_and_cut_files_are_refused(tmp_path):
    counts, positions = write(tmp_path, zipped=True)
    with pytest.raises(ValueError, match="no such file"):
        read_st_array(str(tmp_path / "none.tsv"), positions, mpp=0.5)
    Path(counts).write_bytes(Path(counts).read_bytes()[:-12])
    with pytest.raises(ValueError, match="cannot be read"):
        read_st_array(counts, positions, mpp=0.5)


@pytest.mark.parametrize(("section", "num_spots"), [("C2", 187), ("C3", 180), ("C4", 184)])
def test_her2st(her2st, section, num_spots):
    paths = [str(HER2ST / f"{section}{end}") for end in (".tsv.gz", "_selection.tsv")]
    spots = her2st(section)
    assert len(spots) == num_spots
    assert spots.radius0 == pytest.approx(73, abs=0.5)
    if section == "C2":  # pandas takes a while, so one section is compared
        table = pd.read_csv(paths[0], sep="\t", index_col=0)
        np.testing.assert_array_equal(spots.counts.toarray(), table.loc[spots.spot_id].to_numpy())
        assert spots.genes == table.columns.tolist()
    selection = pd.read_csv(paths[1], sep="\t").query("selected == 1")
    selection.index = selection["x"].astype(str) + "x" + selection["y"].astype(str)
    np.testing.assert_array_equal(spots.xy0, selection.loc[spots.spot_id, ["pixel_x", "pixel_y"]])


def lattice(tmp_path, pitch0=400, selected="1", separator="\t"):
    places = [(x, y) for x in range(1, 7) for y in range(1, 6)]
    counts = "\tEPCAM\tKRT8\n" + "".join(f"{x}x{y}\t1\t2\n" for x, y in places)
    rows = [["x", "y", "pixel_x", "pixel_y", "selected"]]
    rows += [[f"{x}.0", y, x * pitch0, y * pitch0, selected] for x, y in places]
    text = "".join(separator.join(map(str, row)) + "\n" for row in rows)
    return write(tmp_path, counts, text)


@pytest.mark.parametrize("selected", ["1", "1.0", "True", "TRUE"])
@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_positions_as_pandas_and_r_write_them(tmp_path, selected, separator):
    paths = lattice(tmp_path, selected=selected, separator=separator)
    assert len(read_st_array(*paths, mpp=0.5)) == 30


def test_the_pitch_of_the_array_states_the_resolution(tmp_path):
    paths = lattice(tmp_path)
    stated = read_st_array(*paths, mpp=0.5).stated_mpp
    assert [statement.mpp for statement in stated] == pytest.approx([0.5, 0.375])
    assert read_st_array(*paths, mpp=0.5, spot_diameter_um=60.0).stated_mpp == ()
    with pytest.raises(ValueError, match=r"1 um/px in use, but 0\.5 um/px by the pitch of the ST"):
        read_spots({"spots": paths[0], "spot_positions": paths[1]}, 1.0)


@pytest.mark.parametrize("counts", ["\xff\tEPCAM\n1x1\t1\n", "\tEPCAM\n1x1\t1\x0b2\n"])
def test_odd_bytes_give_one_line(tmp_path, counts):
    paths = lattice(tmp_path)
    Path(paths[0]).write_bytes(counts.encode("latin-1"))
    with pytest.raises(ValueError, match=r"c\.tsv: not a table of counts") as caught:
        read_st_array(*paths, mpp=0.5)
    assert len(str(caught.value).splitlines()) == 1


def test_features_that_are_no_genes_are_left_out(tmp_path):
    paths = lattice(tmp_path)
    text = Path(paths[0]).read_text()
    Path(paths[0]).write_text(text.replace("KRT8", "ERCC-00002"))
    assert read_st_array(*paths, mpp=0.5).genes == ["EPCAM"]
