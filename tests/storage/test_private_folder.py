"""Folders for one user below a shared one; test_cache_space.py has what is refused."""

import os
import stat

import pytest

from scellst_ray.storage.private_folder import is_private, make_private_folder


def test_a_folder_is_made_once_and_kept(tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        make_private_folder(folder, "x")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert is_private(folder)
    (folder / "c").write_text("")
    make_private_folder(folder, "x")
    assert [path.name for path in folder.iterdir()] == ["c"]


def test_the_refusal_names_the_remedy(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o773)
    with pytest.raises(PermissionError, match=r"open: may be .* \(mode 773\).* or set X to Y$"):
        make_private_folder(tmp_path / "open", "set X to Y")


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o755, 0o777])
def test_what_others_may_enter_is_not_private(tmp_path, mode):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    assert not is_private(folder)


def test_links_files_and_folders_of_others_are_not_private(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "file").write_text("")
    assert is_private(own)
    assert not any(is_private(tmp_path / name) for name in ("link", "file", "absent"))
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert not is_private(own)
