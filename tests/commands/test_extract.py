"""`scellst-ray extract`: its records decide the exit code."""

from scellst_ray.commands import extract as command
from scellst_ray.stages.config import ExtractConfig
from tests.commands.test_run_end import record


def test_run_extract_reports_the_records_it_got(capsys, monkeypatch):
    monkeypatch.setattr(command, "extract", lambda *_: {"s": record("done")})
    config = ExtractConfig(manifest="m.csv", out="o")
    assert command.run_extract(config) == 0
    assert "1 done" in capsys.readouterr().out
