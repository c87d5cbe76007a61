"""Name the folder or file of spots that a user may have meant with a path near it."""

import fsspec

from scellst_ray.spots.files import full_uri, shown

MATRIX_ENDINGS = ("feature_bc_matrix.h5", "feature_bc_matrix")
POSITION_STEMS = ("tissue_positions",)
# Files that lie in an `outs` folder and end like a table of counts.
TABLES_OF_10X = ("barcodes.tsv", "features.tsv", "genes.tsv")
BIN_NAME = "square_"
PREFERRED_BIN = "square_008um"
MAX_DEPTH, MAX_FOLDERS, MAX_LISTED, MAX_PARENTS = 3, 200, 5, 4


def is_outs(fs: fsspec.AbstractFileSystem, folder: str) -> bool:
    """Return whether a folder holds a matrix and positions as Space Ranger writes them."""
    names = _names_in(fs, folder)
    if "spatial" not in names or not any(name.endswith(MATRIX_ENDINGS) for name in names):
        return False
    return any(name.startswith(POSITION_STEMS) for name in _names_in(fs, f"{folder}/spatial"))


def check_outs_path(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Check that a path is an `outs` folder, or at least that no such folder lies near it.

    Args:
        fs: File system of the path.
        path: What the manifest names as `spots`.

    Raises:
        ValueError: The path is no `outs` folder, but such folders or .h5ad files lie above or below
            it; or it is the output of another instrument. The message names what to give.
    """
    path = path.rstrip("/")
    if is_outs(fs, path):
        return
    what = _other_output(fs, path)
    if what:
        message = f"{full_uri(fs, path)}: {what}"
        raise ValueError(message)
    found = _above(fs, path)
    if found:
        message = (
            f"{full_uri(fs, path)}: lies within an output folder of Space Ranger. Give that folder "
            f"as `spots`: {_choices(fs, found)}."
        )
        raise ValueError(message)
    found = _below(fs, path)
    tables = [name for name in sorted(_names_in(fs, path)) if name.endswith(".h5ad")]
    if not found and tables:
        found = [f"{path}/{name}" for name in tables]
    if not found and not fs.exists(path):
        found = _below(fs, path.rpartition("/")[0], depth=1)
    if not found and fs.isfile(path):
        parent = path.rpartition("/")[0]
        message = (
            f"{full_uri(fs, path)}: is a file that is not read by itself. Give the folder that "
            "holds a matrix (filtered_feature_bc_matrix.h5) and spatial/tissue_positions.csv, an "
            f".h5ad file, or a table of counts that ends in .tsv; {full_uri(fs, parent)} holds "
            f"{shown(sorted(_names_in(fs, parent))[:10])}."
        )
        raise ValueError(message)
    if found:
        state = "is no output folder of Space Ranger" if fs.exists(path) else "does not exist"
        given = "one of these" if len(found) > 1 else "this"
        message = f"{full_uri(fs, path)}: {state}. Give {given} as `spots`: {_choices(fs, found)}."
        raise ValueError(message)


def _names_in(fs: fsspec.AbstractFileSystem, folder: str) -> set[str]:
    """Return the names in a folder; none if it is no folder or cannot be listed."""
    try:
        if not fs.isdir(folder):
            return set()
        return {entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(folder, detail=False)}
    except OSError:
        return set()


def _other_output(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """Return what to do with a path that other software wrote; None if it is not known."""
    names = _names_in(fs, path)
    if path.endswith(".zarr") or names & {".zgroup", "zarr.json"}:
        return (
            "is a Zarr store, which is not read. Write the table with the spots as .h5ad: "
            "anndata.read_zarr(...).write_h5ad(...)."
        )
    if "experiment.xenium" in names:
        return (
            "is the output of Xenium, which measures cells, not spots. Name it in the manifest's "
            "column `xenium` for `evaluate expression`."
        )
    return None


def _above(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Return the nearest folder above a path that is an `outs` folder, if the path exists."""
    if not fs.exists(path):
        return []
    folder = path
    for _ in range(MAX_PARENTS):
        folder = folder.rpartition("/")[0]
        if not folder:
            return []
        if is_outs(fs, folder):
            return [folder]
    return []


def _below(fs: fsspec.AbstractFileSystem, path: str, depth: int = MAX_DEPTH) -> list[str]:
    """Return the `outs` folders below a path, the preferred bin of Visium HD first."""
    found: list[str] = []
    level, num_seen = [path], 0
    for _ in range(depth):
        children: list[str] = []
        for folder in level:
            for name in sorted(_names_in(fs, folder)):
                child = f"{folder}/{name}"
                num_seen += 1
                if num_seen > MAX_FOLDERS * MAX_DEPTH or not fs.isdir(child):
                    continue
                (found if is_outs(fs, child) else children).append(child)
        level = children[:MAX_FOLDERS]
    return sorted(found, key=lambda folder: (PREFERRED_BIN not in folder, folder))


def _choices(fs: fsspec.AbstractFileSystem, folders: list[str]) -> str:
    """Return the paths to choose from, with the diameter for bins of Visium HD."""
    texts = []
    for folder in folders[:MAX_LISTED]:
        name = folder.rsplit("/", 1)[-1]
        digits = name.removeprefix(BIN_NAME).removesuffix("um")
        is_bin = name.startswith(BIN_NAME) and digits.isdecimal()
        hint = f" (and spot_diameter_um {int(digits)})" if is_bin else ""
        texts.append(f"{full_uri(fs, folder)}{hint}")
    return ", ".join(texts) + (
        f" and {len(folders) - MAX_LISTED} more" * (len(folders) > MAX_LISTED)
    )
