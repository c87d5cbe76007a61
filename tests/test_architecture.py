"""The rules of the layout, kept by walking the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "scellst_ray"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60

# What each part may import of the package, besides itself: the layers from the bottom up.
BOTTOM = {"geometry", "schemas"}
FILES_HERE = {"logs", "memory_limit", "remote", "cache_room", "node_cache"}
GROUND = BOTTOM | FILES_HERE | {"cohort", "storage", "__version__"}
KNOWLEDGE = GROUND | {"slides", "nuclei", "spots", "models", "expression"}
CROPS = {"crop_format", "crop_store", "crop_order"}
RECORDS = {"runs", "lease", "compaction", "reading", "run_state", "run_summary"} | CROPS
SINKS = {"analysis", "export"}
MAY_IMPORT = {
    "geometry": set(),
    "schemas": set(),
    "cohort": BOTTOM | {"remote"},
    "logs": set(),
    "memory_limit": set(),
    "remote": set(),
    "cache_room": set(),
    "node_cache": {"remote", "cache_room"},
    "storage": BOTTOM | {"node_cache", "remote"},
    "slides": GROUND,
    "nuclei": GROUND,
    "spots": GROUND,
    "expression": GROUND,
    "domain_shift": GROUND,
    "models": GROUND | {"expression", "spots"},
    "runs": GROUND,
    "lease": GROUND,
    "compaction": GROUND | {"runs", "nuclei", "expression", "domain_shift"},
    "reading": GROUND | {"runs", "expression"},
    "crop_format": GROUND,
    "crop_store": GROUND | {"crop_format"},
    "crop_order": GROUND | {"crop_format", "crop_store"},
    "run_state": GROUND | {"crop_format", "lease", "reading", "runs"},
    "run_summary": GROUND | {"run_state"},
    "session": set(),
    "preflight": GROUND,
    "node_facts": GROUND | {"models", "preflight"},
    "analysis": KNOWLEDGE | RECORDS,
    "export": KNOWLEDGE | RECORDS | {"analysis"},
    "pipelines": KNOWLEDGE | RECORDS | {"session", "preflight", "node_facts"},
    "training": KNOWLEDGE | RECORDS | {"session"},
}
# Modules beside these (cli, commands, train, ...) are the top: they may import everything.


def part_of(path):
    """Return the folder or module of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(node):
    """Yield the dotted names a tree imports, `from a import b` as both a.b and a."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield "." * child.level + (child.module or "")
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


IMPORTS = {path: set(imports(tree(path))) for path in FILES}


def those_importing(package):
    """Return the files, relative to the package, that import `package` or something in it."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path, names in IMPORTS.items()
        if any(name == package or name.startswith(f"{package}.") for name in names)
    }


def test_there_is_something_to_check():
    assert len(FILES) > 20
    assert those_importing("ray.data")


def test_ray_lives_in_pipelines_training_and_session():
    homes = ("pipelines/", "training/", "session.py")
    assert {f for f in those_importing("ray") if not f.startswith(homes)} == set()
    assert {f for f in those_importing("ray.data") if not f.startswith("pipelines/")} == set()
    assert {f for f in those_importing("ray.train") if not f.startswith("training/")} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_layer_imports_only_those_below_it(path):
    names = IMPORTS[path]
    assert not [name for name in names if name.startswith(".")], "imports are absolute"
    mine = part_of(path)
    if mine not in MAY_IMPORT:
        return
    inside = [name.split(".")[1] for name in names if name.startswith("scellst_ray.")]
    assert set(inside) - MAY_IMPORT[mine] - {mine} == set()


def test_nothing_imports_the_top():
    top = {part_of(path) for path in FILES} - set(MAY_IMPORT) - {"__init__"}
    assert "cli" in top
    for path in FILES:
        if part_of(path) in MAY_IMPORT:
            parts = {n.split(".")[1] for n in IMPORTS[path] if n.startswith("scellst_ray.")}
            assert not parts & top


def test_pixels_stay_without_torch():
    assert {
        f for f in those_importing("torch") if f.startswith(("slides/", "nuclei/", "spots/"))
    } == set()


@pytest.mark.parametrize("folder", ["slides", "models", "pipelines"])
def test_no_module_of_a_layer_imports_the_package_itself_in_a_circle(folder):
    """Follow imports within one folder: each module comes after those it imports."""
    modules = {f"scellst_ray.{folder}.{p.stem}": p for p in (PACKAGE / folder).glob("*.py")}
    below = {name: IMPORTS[path] & set(modules) for name, path in modules.items()}
    while below:
        free = {name for name, needs in below.items() if not needs}
        assert free, f"circle among {sorted(below)}"
        below = {name: needs - free for name, needs in below.items() if name not in free}


def printed_by(code):
    """Return what a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    return subprocess.check_output(command, text=True, cwd=PACKAGE.parent).strip()


def test_importing_the_package_is_light():
    code = (
        "import sys, scellst_ray; heavy = {'ray', 'torch', 'numpy', 'pyarrow', 'openslide'};"
        "print(scellst_ray.__version__, sorted(heavy & set(sys.modules)))"
    )
    version, _, loaded = printed_by(code).partition(" ")
    assert version.count(".") == 2
    assert loaded == "[]"


def test_the_command_line_does_not_load_what_draws():
    # It writes to the home folder, whatever the command.
    code = "import sys, scellst_ray.commands; print('matplotlib' in sys.modules)"
    assert printed_by(code) == "False"


def test_reading_pixels_starts_neither_ray_nor_torch():
    code = (
        "import sys, scellst_ray.compaction, scellst_ray.slides.reader, scellst_ray.nuclei.crops,"
        "scellst_ray.crop_order;"
        "print(sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    assert printed_by(code) == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert long == {}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_only_the_tile_guard_and_a_jobs_main_catch_everything(path):
    broad = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    ]
    allowed = {"pipelines/tiles.py", "cli.py"}
    if path.relative_to(PACKAGE).as_posix() in allowed:
        assert len(broad) <= 1
    else:
        assert broad == []
