"""`scellst-ray gc` says which files nothing reads, and removes them."""

from pathlib import Path

from scellst_ray.commands.gc import GcConfig, gc
from scellst_ray.runs.leftovers import NOTES, ORPHANS
from tests.support.run_folders import make_run, record


def test_leftovers_are_counted_and_removed(tmp_path, capsys):
    run = make_run(tmp_path, {"a": 1}, [record("a", "empty")])
    leftovers = [Path(run.uri, "shards", "x.parquet"), Path(run.uri, "attempts", "s", "w.json")]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(700))
    assert gc(GcConfig(run=run.uri, dry_run=True)) == 0
    shown = capsys.readouterr().out
    assert "to remove: 2 files, 1,400 bytes" in shown
    assert ORPHANS in shown
    assert NOTES in shown
    assert all(path.exists() for path in leftovers)
    assert gc(GcConfig(run=run.uri)) == 0
    assert "removed: 2 files, 1,400 bytes" in capsys.readouterr().out
    assert not any(path.exists() for path in leftovers)
    assert gc(GcConfig(run=run.uri)) == 0
    assert "removed: 0 files, 0 bytes" in capsys.readouterr().out
