"""The rules of the layout, kept by walking the syntax trees."""

import ast
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.support.paths import ROOT

PACKAGE, TESTS = ROOT / "scellst_ray", ROOT / "tests"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60

# What each room may import of the package besides itself. The longest prefix of a module's name
# decides, here and among what may be imported: "models" allows models.mil.stored_head, too.
GROUND = {"core", "storage"}
KNOWLEDGE = GROUND | {"slides", "nuclei", "models", "spots"}
MAY_IMPORT = {
    "": {"core.version", "runs.reading"},
    "core": set(),
    "storage": set(),
    "slides": GROUND,
    "nuclei": GROUND,
    "models": GROUND,
    # Without torch, so that a run can be read without it.
    "models.mil.stored_head": GROUND,
    "models.mil.head_file": GROUND,
    "models.weights": GROUND,
    "spots": GROUND,
    "runs": GROUND
    | {"slides.manifest", "nuclei.seams", "nuclei.imported.table"}
    | {"models.mil.stored_head", "models.mil.head_file", "models.weights.digests"},
    "stages": KNOWLEDGE | {"runs"},
    "training": GROUND | {"models", "runs"},
    "export": GROUND | {"slides", "runs", "models.mil.stored_head"},
    "report": GROUND | {"models.mil.stored_head", "spots", "runs", "export.colours"},
    "preflight": GROUND | {"slides", "models", "runs", "stages"},
    "evaluation": KNOWLEDGE | {"runs", "stages.supervision"},
    "annotation": KNOWLEDGE | {"runs", "export.cell_blocks"},
    "pipelines": GROUND | {"slides", "models", "runs", "stages", "preflight"},
    "commands": KNOWLEDGE
    | {"runs", "stages", "training", "export", "report", "annotation", "preflight", "evaluation"}
    | {"pipelines"},
}
MAX_FLOORS = 9
WITHOUT_TORCH = (
    *("core/", "storage/", "slides/", "nuclei/", "spots/", "runs/", "export/"),
    "report/",
    *("models/weights/", "models/mil/stored_head.py", "models/mil/head_file.py"),
)

# Files without a test of their own name: tests of the files around them cover them. This list may
# only shrink.
WITHOUT_MIRROR = {
    "commands/crossvalidate_report.py",
    "commands/demo.py",
    "commands/evaluate_encoder.py",
    "commands/evaluate_expression.py",
    "commands/evaluate_segmentation.py",
    "commands/manifest_hest.py",
    "commands/plan.py",
    "commands/predict.py",
    "commands/simulate.py",
    "stages/bags.py",
    "stages/segmenter_settings.py",
    "stages/supervision.py",
}
# Tests that are about no single file. This list may only shrink, too.
WITHOUT_FILE = {
    "pipelines/cellvit_run.py",
    "pipelines/cellvit_slides.py",
    "pipelines/extract_on_s3.py",
    "pipelines/imported_nuclei.py",
    "pipelines/other_encoders.py",
    "pipelines/planned_run.py",
    "pipelines/tending.py",
    "storage/files_s3.py",
}


def module_of(path):
    """Return the dotted name of a file within the package; that of a folder for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").rstrip(".")


def row_of(module):
    """Return the longest prefix of a module's name that has a row; None if none has."""
    names = module.split(".")
    prefixes = (".".join(names[:count]) for count in range(len(names), 0, -1))
    return next((prefix for prefix in prefixes if prefix in MAY_IMPORT), None if module else "")


class Facts(NamedTuple):
    """What the rules ask of one file.

    Attributes:
        lines: Number of lines.
        imports: Dotted names it imports, `from a import b` as both a.b and a.
        long_functions: Length in lines of each function beyond the limit, by name.
        broad_handlers: Lines of the handlers that catch every exception.
    """

    lines: int
    imports: set
    long_functions: dict
    broad_handlers: list


def facts_of(path):
    """Return the facts of a file, from one walk through its syntax tree."""
    text = path.read_text(encoding="utf-8")
    facts = Facts(len(text.splitlines()), set(), {}, [])
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.Import):
            facts.imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            facts.imports.add("." * node.level + (node.module or ""))
            facts.imports.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES:
                facts.long_functions[node.name] = node.end_lineno - node.lineno + 1
        elif isinstance(node, ast.ExceptHandler) and (
            node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        ):
            facts.broad_handlers.append(node.lineno)
    return facts


FACTS = {path: facts_of(path) for path in FILES}
IMPORTS = {path: facts.imports for path, facts in FACTS.items()}
MODULES = {module_of(path) for path in FILES if path.name != "__init__.py"}
ROOMS = {path.name for path in PACKAGE.iterdir() if path.is_dir()}


def modules_in(names):
    """Return the modules among dotted names; a name within a module stands for the module."""
    inside = (name.removeprefix("scellst_ray.") for name in names if name != "scellst_ray")
    return {name for name in inside if name in MODULES}


IMPORTED = {module_of(path): modules_in(IMPORTS[path]) for path in FILES}


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


def test_ray_lives_in_pipelines_and_training():
    homes = ("pipelines/", "training/")
    assert {f for f in those_importing("ray") if not f.startswith(homes)} == set()
    assert {f for f in those_importing("ray.data") if not f.startswith("pipelines/")} == set()
    assert {f for f in those_importing("ray.train") if not f.startswith("training/")} == set()


def test_a_file_without_a_row_has_none():
    assert row_of("models.mil.stored_head") == "models.mil.stored_head"
    assert row_of("models.mil.head") == "models"
    assert row_of("") == ""
    assert row_of("attic.box") is None


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_what_its_row_allows(path):
    assert not [name for name in IMPORTS[path] if name.startswith(".")], "imports are absolute"
    row = row_of(module_of(path))
    assert row is not None, "this file's room has no row in MAY_IMPORT"
    allowed = MAY_IMPORT[row] | {row.split(".")[0]}
    beyond = {
        name
        for name in IMPORTED[module_of(path)]
        if not any(name == part or name.startswith(f"{part}.") for part in allowed)
    }
    assert beyond == set()


def test_every_row_has_a_file():
    assert set(MAY_IMPORT) == {row_of(module) for module in IMPORTED}


def test_only_init_lies_at_the_root():
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_rooms_lie_on_few_floors():
    """A room lies above all that it imports; a row that is finer than a room counts as one."""
    below = {row: set() for row in MAY_IMPORT}
    for module, names in IMPORTED.items():
        below[row_of(module)] |= {row_of(name) for name in names} - {row_of(module)}
    # A room may import its own finer rows, and they the room's: they share a floor.
    for row, rows in below.items():
        rows -= {other for other in rows if other.split(".")[0] == row.split(".")[0]}
    floors = {}
    while len(floors) < len(below):
        free = [row for row in below if row not in floors and below[row] <= set(floors)]
        assert free, f"circle among {sorted(set(below) - set(floors))}"
        floors |= {row: 1 + max((floors[b] for b in below[row]), default=0) for row in free}
    assert max(floors.values()) <= MAX_FLOORS


def test_no_module_imports_itself_in_a_circle():
    left = {module: set(names) for module, names in IMPORTED.items()}
    while left:
        free = {module for module, needs in left.items() if not needs & set(left)}
        assert free, f"circle among {sorted(left)}"
        left = {module: needs for module, needs in left.items() if module not in free}


def test_tests_mirror_the_package():
    """For scellst_ray/a/b.py there is tests/a/test_b.py."""
    modules = {p.relative_to(PACKAGE).as_posix() for p in FILES if p.name != "__init__.py"}
    tests = {
        p.relative_to(TESTS).as_posix().replace("test_", "")
        for p in TESTS.rglob("test_*.py")
        if p.relative_to(TESTS).parts[0] in ROOMS
    }
    assert modules - tests == WITHOUT_MIRROR
    assert tests - modules == WITHOUT_FILE


def test_pixels_stay_without_torch():
    assert {f for f in those_importing("torch") if f.startswith(WITHOUT_TORCH)} == set()


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


def test_reading_pixels_starts_neither_ray_nor_torch():
    code = (
        "import sys, scellst_ray.runs.compaction, scellst_ray.slides.reader;"
        "import scellst_ray.nuclei.crops, scellst_ray.training.crop_order;"
        "print(sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    assert printed_by(code) == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_files_and_functions_stay_short(path):
    assert FACTS[path].lines <= MAX_FILE_LINES
    assert FACTS[path].long_functions == {}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_only_the_tile_guard_and_a_jobs_main_catch_everything(path):
    broad = FACTS[path].broad_handlers
    allowed = {"stages/tiles.py", "commands/cli.py"}
    if path.relative_to(PACKAGE).as_posix() in allowed:
        assert len(broad) <= 1
    else:
        assert broad == []
