"""Digests of files, and how a file differs from the expected one."""

import hashlib

from scellst_ray.models.weights.digests import (
    Digests,
    ExpectedFile,
    describe_mismatch,
    digests_of,
    file_digest,
)


def digests_of_bytes(content):
    return Digests(
        len(content), hashlib.sha256(content).hexdigest(), hashlib.md5(content).hexdigest()
    )


def test_digests_of_a_file_are_those_of_its_bytes(tmp_path):
    for content in (b"", b"abc", b"x" * ((1 << 20) + 1)):
        (tmp_path / "w").write_bytes(content)
        assert digests_of(tmp_path / "w") == digests_of_bytes(content)
        assert file_digest(tmp_path / "w") == f"sha256:{digests_of_bytes(content).sha256}"


def test_a_digest_may_be_known_in_part():
    found = digests_of_bytes(b"abc")
    assert describe_mismatch(found, ExpectedFile(sha256=found.sha256[:16].upper())) is None
    assert describe_mismatch(found, ExpectedFile()) is None
    assert "its SHA-256 is ba78" in describe_mismatch(found, ExpectedFile(sha256="ba79"))
    assert "it has 3 bytes, expected 4" in describe_mismatch(found, ExpectedFile(4, "ba79"))
