"""Digests of files, and how a file differs from the expected one."""

import hashlib

import pytest

from scellst_ray.models.weights.digests import (
    Digests,
    ExpectedFile,
    describe_mismatch,
    digests_of,
    file_digest,
    is_earlier_digest,
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


@pytest.mark.parametrize(
    ("earlier", "now", "expected"),
    [
        ("timm:vit.a", "timm:vit.a:sha256:00", True),
        ("timm:vit.a", "timm:vit.ab:sha256:00", False),
        ("timm:vit.a:sha256:01", "timm:vit.a:sha256:00", False),
        ("random:5", "random:5:sha256:00", False),
        (None, "timm:vit.a:sha256:00", False),
        ("timm:vit.a", None, False),
    ],
)
def test_digests_of_earlier_releases_hold_the_name_alone(earlier, now, expected):
    assert is_earlier_digest(earlier, now) is expected
