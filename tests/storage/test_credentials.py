"""Credentials in a URI are refused before anything is stored; no message shows them."""

import pytest
import yaml

from scellst_ray.commands import cli
from scellst_ray.runs.folder import RunFolder, open_embedded_run, read_run_info
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.storage.credentials import refuse_credentials, secret_in

HOLDING = [
    "s3://AKIA123:hunter2@bucket/a.svs",
    "s3://hunter2@bucket/a.svs",
    "https://me:hunter2@host/a.svs",
    "abfss://container:hunter2@account.dfs.core.windows.net/a.svs",
    "https://b.s3.amazonaws.com/a.svs?X-Amz-Algorithm=A&X-Amz-Credential=hunter2",
    "https://b.s3.amazonaws.com/a b.svs?AWSAccessKeyId=A&Signature=hunter2&Expires=1",
    "https://storage.googleapis.com/b/a.svs?x-goog-signature=hunter2",
    "https://account.blob.core.windows.net/c/a.svs?sv=2024&sp=r&sig=hunter2",
    "https://host/a.svs?access_token=hunter2",
    "https://host/a.svs?v=1&token=hunter2",
    "zip://a.svs::https://me:hunter2@host/a.zip",
    "filecache::s3://key:hunter2@bucket/a.svs",
]
FREE = [
    "/data/a@b/c?d.svs",
    "s3://bucket/a@b.svs",
    "abfss://container@account.dfs.core.windows.net/a.svs",
    "https://host/a.svs?version=3&download=1",
    "hunter2@example.org",
    "signature=x",
    "",
]


@pytest.mark.parametrize("uri", HOLDING)
def test_a_uri_that_holds_some_is_seen_and_not_shown(uri):
    reason = secret_in(uri)
    assert reason is not None
    assert "hunter2" not in reason
    assert "AKIA123" not in reason
    assert "AWS_ACCESS_KEY_ID" in reason


@pytest.mark.parametrize("text", FREE)
def test_others_pass(text):
    assert secret_in(text) is None
    refuse_credentials({"a": text, "b": [text, None], "c": 3})


@pytest.mark.parametrize("value", [HOLDING[0], ["s3://b/a", HOLDING[4]], (HOLDING[1],)])
def test_configurations_are_refused(value):
    with pytest.raises(ValueError, match=r"^crops: .* was given") as raised:
        refuse_credentials({"out": "s3://b/run", "crops": value})
    assert "hunter2" not in str(raised.value)


def test_no_configuration_with_credentials_is_kept(tmp_path):
    run = RunFolder(str(tmp_path), "")
    with pytest.raises(ValueError, match=r"^manifest: s3://bucket/a.svs was given"):
        run.write_config({"manifest": HOLDING[0]})
    assert list(tmp_path.iterdir()) == []
    run.write_config({"manifest": "s3://bucket/m.csv"})
    text = (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load(text) == {"manifest": "s3://bucket/m.csv"}


@pytest.mark.parametrize("column", ["uri", "spots", "remark"])
def test_manifests_are_refused_by_row(tmp_path, column):
    values = {"slide_id": "a", "uri": "s3://b/a.svs", "spots": "s3://b/a", "remark": "-"}
    lines = [values, values | {"slide_id": "b", column: HOLDING[5]}]
    manifest = tmp_path / "m.csv"
    manifest.write_text("\n".join(",".join(row) for row in [values, *(v.values() for v in lines)]))
    with pytest.raises(ValueError, match=r"row 2: .*a b.svs was given with credentials") as raised:
        read_manifest(str(manifest))
    assert "hunter2" not in str(raised.value)
    assert "row 1" not in str(raised.value)


@pytest.mark.whole
def test_the_command_line_says_so_and_starts_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["extract", "--manifest", HOLDING[0], "--out", str(out), "--encoder", "random:0"]
    assert cli.main(words) == 1
    shown = "".join(capsys.readouterr())
    assert "manifest: s3://bucket/a.svs was given with credentials" in shown
    assert "hunter2" not in shown
    assert not out.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["status", "https://me:hun/ter2@host/run"],
        pytest.param(
            ["doctor", "--manifest", "https://me:hun#ter2@host/m.csv"], marks=pytest.mark.whole
        ),
        ["gc", "s3://AKIA123:hun/ter2@bucket/run", "--dry-run"],
        ["extract", "--manifst", "https://me:hun/ter2@host/m.csv"],
        ["extract", "--core-px", "https://host/a?sig=ter2"],
        ["extract", "--manifest", "m.csv", "--out", "o", "--config", "https://me:hun/ter2@host/c"],
    ],
)
def test_no_line_of_the_command_line_shows_a_secret(words, capsys):
    try:
        code = cli.main(words)
    except SystemExit as error:
        code = error.code
    assert code in (1, 2)
    shown = "".join(capsys.readouterr())
    assert shown
    assert "ter2" not in shown


@pytest.mark.parametrize("call", [read_manifest, read_run_info, open_embedded_run])
def test_errors_of_the_python_interface_show_none(call):
    with pytest.raises((ValueError, OSError)) as raised:
        call("memory://me:hun/ter2@absent")
    assert "ter2" not in str(raised.value)
