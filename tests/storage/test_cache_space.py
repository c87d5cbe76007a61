"""The node's cache: which entries stay, which go first, and what happens when none can go."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from scellst_ray import storage
from scellst_ray.storage import cache_space
from scellst_ray.storage.node_cache import hold
from tests.support import cached
from tests.support.cached import copies, every, limit, limit_disk, use
from tests.support.object_server import serving

cache, put = cached.cache, cached.put  # fixtures
pytestmark = pytest.mark.usefixtures("cache")

KB = 1000


def test_what_was_used_least_recently_goes_first(put, cache, monkeypatch):
    limit(monkeypatch, 1000)
    uris = {name: put(name, b"x" * 300) for name in "abcdef"}
    for name in "abca":
        use(uris[name])
    use(uris["d"])
    assert copies(cache) == ["a", "c", "d"]
    held = hold(uris["c"])
    use(uris["a"])
    held.close()  # the end of use counts, too
    use(uris["e"])
    use(uris["f"])
    assert copies(cache) == ["c", "e", "f"]


def test_what_is_held_stays_and_the_bound_gives_way(put, cache, monkeypatch, caplog):
    limit(monkeypatch, 1000)
    held = [hold(put(name, name.encode() * 400)) for name in "abc"]
    assert copies(cache) == ["a", "b", "c"]
    assert "exceed the 1e-06 GB" in caplog.text
    assert "next to 8e-07 GB in use" in caplog.text
    use(put("d", b"d" * 400))
    assert [one.path.read_bytes()[:1] for one in held] == [b"a", b"b", b"c"]
    for one in held:
        one.close()
        one.close()
    use(put("e", b"e" * 400))
    assert copies(cache) == ["c", "e"]


def test_a_use_counts_from_its_start_in_case_its_end_is_a_kill(put, cache, monkeypatch):
    limit(monkeypatch, 1000)
    uris = [put(name, name.encode() * 400) for name in "abc"]
    use(uris[0])
    use(uris[1])
    held = hold(uris[0])
    _, _, (lock,), _ = held._release.detach()
    os.close(lock)  # as the kernel does
    use(uris[2])
    assert copies(cache) == ["a", "c"]


def test_what_tells_no_size_is_counted_once_it_is_there(put, cache, monkeypatch):
    limit(monkeypatch, 1000)
    ask = MemoryFileSystem.info
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *a: ask(*a) | {"size": None})
    for name in "abcd":
        use(put(name, name.encode() * 400))
    assert copies(cache) == ["b", "c", "d"]


def test_letting_go_happens_when_forgotten(put, cache, monkeypatch):
    limit(monkeypatch, 0)
    held = hold(put("a", b"a"))
    del held
    use(put("b", b"b"))
    assert copies(cache) == ["b"]


def test_an_object_larger_than_the_cache_can_still_be_read(put, cache, monkeypatch, caplog):
    limit(monkeypatch, 1000)
    use(put("a", b"a" * 400))
    assert not caplog.records
    assert use(put("large", b"l" * 5000)) == b"l" * 5000
    assert copies(cache) == ["large"]
    assert "large: its 5e-06 GB exceed the 1e-06 GB" in caplog.text
    assert "set SCELLST_RAY_CACHE_GB" in caplog.text
    use(put("b", b"b" * 400))
    assert copies(cache) == ["b"]


def test_pinned_files_stay(put, cache, monkeypatch):
    limit(monkeypatch, 0)
    path = storage.local_copy(put("weights.pt", b"w"))
    assert storage.local_copy(put("weights.pt", b"w2")) != path
    use(put("a", b"a"))
    assert copies(cache) == ["a", "weights.pt", "weights.pt"]
    assert path.read_bytes() == b"w"


def test_by_default_half_of_the_disk_is_the_bound(put, cache, monkeypatch):
    monkeypatch.delenv("SCELLST_RAY_CACHE_GB")
    uris = [put(name, b"x" * 8192) for name in "abcde"]
    limit_disk(monkeypatch, lambda: 8 * 8192 - sum(8192 for _ in copies(cache)))
    for uri in uris:
        use(uri)
    assert copies(cache) == ["b", "c", "d", "e"]
    monkeypatch.setattr(cache_space, "DEFAULT_BYTES", 2 * 8192)
    use(uris[0])
    assert copies(cache) == ["a", "e"]


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_bound_that_is_none_is_refused(put, monkeypatch, text):
    monkeypatch.setenv("SCELLST_RAY_CACHE_GB", text)
    with pytest.raises(ValueError, match=f"SCELLST_RAY_CACHE_GB='{text}': expected a number"):
        hold(put("a", b"a"))


def test_what_a_killed_process_left_goes_first(put, cache, monkeypatch):
    limit(monkeypatch, 1000)
    use(put("a", b"a" * 400))
    left = cache / "files" / f"{'0' * 32}-500"
    left.mkdir()
    (left / ".s.svs.part").write_bytes(b"s" * 100)
    (cache / "locks" / ("0" * 32)).touch()  # used last, but without a copy
    (cache / "files" / "not ours").mkdir()
    use(put("b", b"b" * 400))
    assert copies(cache) == ["a", "b"]
    assert (cache / "files" / "not ours").exists()


def test_a_copy_cut_by_others_is_fetched_again(put):
    uri = put("a", b"a" * 400)
    with hold(uri) as held:
        held.path.write_bytes(b"a" * 10)
    assert use(uri) == b"a" * 400


# The disk is full.


def test_a_full_disk_makes_room_first_and_then_says_so(put, cache, monkeypatch):
    use(put("a", b"a" * 4096))
    held = hold(put("b", b"b" * 4096))
    limit_disk(monkeypatch, lambda: 5 * 4096 - len(b"".join(every(cache))))
    use(put("c", b"c" * 4 * 4096))
    assert copies(cache) == ["b", "c"]
    message = (
        rf"d: {cache} has .* GB free for its .* GB \(20,480 bytes\), and all other files of this "
        "cache are in use or being downloaded; free disk space, or set SCELLST_RAY_CACHE_DIR"
    )
    with pytest.raises(OSError, match=message) as error:
        hold(put("d", b"d" * 5 * 4096))
    assert error.value.errno == errno.ENOSPC
    held.close()
    assert use(put("d", b"d" * 5 * 4096)) == b"d" * 5 * 4096


def test_a_disk_that_runs_full_meanwhile(put, cache, monkeypatch):
    fetch, seen = MemoryFileSystem.get_file, []

    def full(self, remote_path, path, **kwargs):
        fetch(self, remote_path, path, **kwargs)
        seen.append(copies(cache))
        if len(seen) <= times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    times = 0
    use(put("a", b"a"))
    held = hold(put("b", b"b"))
    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    limit_disk(monkeypatch, lambda: 3)
    times = 1
    assert use(put("c", b"ccc")) == b"ccc"
    assert seen == [[".c.part", "a", "b"], [".c.part", "b"]]  # the second time with more space
    seen.clear()
    times = 2
    with pytest.raises(OSError, match="free disk space, or set SCELLST_RAY_CACHE_DIR"):
        hold(put("d", b"d"))
    assert copies(cache) == ["b"]
    held.close()


def test_two_downloads_are_not_promised_the_same_room(monkeypatch, cache):
    content = os.urandom(400 * KB)
    with serving({"a": content, "b": content}) as (address, objects):
        objects.go_on.clear()
        free = 700 * KB  # for one of them
        written = lambda: sum(p.stat().st_blocks * 512 for p in cache.glob("files/*/.*"))  # noqa: E731
        limit_disk(monkeypatch, lambda: free - written())
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(use, f"{address}/a")
            objects.half_sent.wait(20)
            with pytest.raises(OSError, match="being downloaded"):
                hold(f"{address}/b")
            objects.go_on.set()
            assert first.result() == content
    assert objects.gets("/b") == 0


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return where the cache of this user would lie; nothing is there."""
    monkeypatch.setenv("SCELLST_RAY_CACHE_DIR", str(tmp_path / "parent"))
    (tmp_path / "parent").mkdir()
    return tmp_path / "parent" / f"scellst_ray_cache_{os.getuid()}"


def refusal(root):
    """Return the message of the refusal, which names folder and variable."""
    with pytest.raises(PermissionError) as raised:
        cache_space.cache_root()
    message = str(raised.value)
    assert message.startswith(f"{root}: ")
    assert "SCELLST_RAY_CACHE_DIR" in message
    assert "\n" not in message
    return message


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707, 0o1777, 0o2775, 0o720, 0o702])
def test_a_folder_that_others_can_write_is_refused(root, mode):
    root.mkdir()
    root.chmod(mode)
    assert f"(mode {mode:o})" in refusal(root)
    assert mode_of(root) == mode


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o711, 0o701])
def test_a_folder_that_others_can_only_read_is_closed(root, mode):
    root.mkdir()
    root.chmod(mode)
    assert cache_space.cache_root() == root
    assert mode_of(root) == 0o700


def test_a_folder_of_another_user_is_refused(root, monkeypatch):
    root.mkdir(mode=0o700)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert f"belongs to user {own}, not to user {own + 1}" in refusal(root)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_given_away_is_refused_though_it_is_closed(root):
    root.mkdir(mode=0o700)
    os.chown(root, 65534, 65534)
    assert "belongs to user 65534" in refusal(root)


@pytest.mark.parametrize("target", ["own", "absent", "itself"])
def test_a_link_is_not_followed(root, tmp_path, target):
    (tmp_path / "own").mkdir(mode=0o700)
    root.symlink_to(root if target == "itself" else tmp_path / target)
    assert "symbolic link" in refusal(root)
    assert list((tmp_path / "own").iterdir()) == []


def test_a_file_in_its_place_is_refused(root):
    root.write_text("")
    assert "no folder" in refusal(root)


@pytest.mark.parametrize("parent", [0o700, 0o755, 0o1777, 0o777])
def test_it_is_made_for_this_user_alone_in_any_parent(root, parent):
    root.parent.chmod(parent)
    before = os.umask(0)
    try:
        assert cache_space.cache_root() == root
    finally:
        os.umask(before)
    assert mode_of(root) == 0o700
    assert mode_of(root.parent) == parent


def test_an_absent_parent_is_made(root, monkeypatch):
    monkeypatch.setenv("SCELLST_RAY_CACHE_DIR", str(root.parent / "a" / "b"))
    found = cache_space.cache_root()
    assert found.parent == root.parent / "a" / "b"
    assert mode_of(found) == 0o700
