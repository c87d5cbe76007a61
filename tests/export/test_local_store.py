"""Folders appear whole, replace only their like, and a failure leaves what was there."""

import pytest

from scellst_ray.export.local_store import Kind, publish_store

KIND = Kind("store of notes", ("mark", "other"))


def writer(text):
    def write(folder):
        folder.mkdir()
        (folder / "mark").write_text(text)

    return write


def test_a_folder_replaces_one_of_its_kind(tmp_path):
    out = tmp_path / "below" / "x.store"
    for text in ("one", "two"):
        publish_store(f"{out}/", KIND, writer(text))
        assert (out / "mark").read_text() == text
        assert [path.name for path in out.parent.iterdir()] == ["x.store"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "x").mkdir()
    publish_store(str(tmp_path / "x"), KIND, writer("one"))
    assert (tmp_path / "x/mark").read_text() == "one"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_else_stays(tmp_path, kind):
    out = tmp_path / "x"
    if kind == "folder":
        out.mkdir()
        (out / "mine").touch()
    else:
        out.write_text("mine")
    with pytest.raises(ValueError, match=r"x: exists and is no store of notes"):
        publish_store(str(out), KIND, writer("one"))
    assert out.read_text() == "mine" if kind == "file" else (out / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failure_leaves_the_old_folder(tmp_path):
    out = tmp_path / "x"
    publish_store(str(out), KIND, writer("one"))

    def fail(folder):
        writer("two")(folder)
        message = "full"
        raise OSError(message)

    with pytest.raises(OSError, match="full"):
        publish_store(str(out), KIND, fail)
    assert (out / "mark").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_remote_folders_are_refused():
    with pytest.raises(ValueError, match=r"memory://b/x: .* local folder only"):
        publish_store("memory://b/x", KIND, writer("one"))
