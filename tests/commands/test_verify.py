"""`scellst-ray verify` says which files are not what was written, and how to go on."""

import json

from scellst_ray import storage
from scellst_ray.commands.verify import VerifyConfig, verify
from tests.support.run_folders import make_run, record


def test_a_whole_run_and_a_damaged_one(tmp_path, capsys):
    run = make_run(tmp_path, {"a": 1, "b": 1}, [record("a", "empty")], config={"core_px": 320})
    info = storage.read_json(f"{run.uri}/run.json")
    del info["identity"]  # the digest of this folder is made up
    storage.publish_json(f"{run.uri}/run.json", info)
    assert verify(VerifyConfig(run=run.uri)) == 0
    assert f"{run.uri}: 4 files read: all are whole" in capsys.readouterr().out.replace("\n", "")
    storage.publish_text(run.record_uri("b"), '{"slide_id"')
    assert verify(VerifyConfig(run=run.uri)) == 1
    shown = capsys.readouterr().out
    assert "1 need a remedy" in shown
    assert "records/b.json" in shown
    assert verify(VerifyConfig(run=run.uri, json=True)) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["files"], found["problems"], found["without_digest"]) == (5, 1, 0)
    (finding,) = found["findings"]
    assert (finding["path"], finding["kind"]) == ("records/b.json", "damaged")
    assert "run the same command again" in finding["remedy"]


def test_tables_without_digests_are_mentioned_once(capsys):
    from tests.runs.test_verify import ARCHIVES

    assert verify(VerifyConfig(run=str(ARCHIVES / "v1" / "run"))) == 0
    assert capsys.readouterr().out.count("an earlier release wrote 3 tables") == 1
