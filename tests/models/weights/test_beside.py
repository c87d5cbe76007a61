"""Weights that were replaced or damaged after their note was written are refused."""

import pytest

from scellst_ray import storage
from scellst_ray.models.encoder.weights_file import local_weights
from scellst_ray.models.weights.beside import check_beside, publish_with_note
from scellst_ray.models.weights.digests import file_digest

ADDRESSES = ["{tmp}/run/encoder.safetensors", "memory://beside/{name}/encoder.safetensors"]


@pytest.fixture(params=ADDRESSES)
def uri(request, tmp_path):
    address = request.param.format(tmp=tmp_path, name=tmp_path.name)
    publish_with_note(address, {"epochs": 3}, lambda path: path.write_bytes(b"weights"))
    return address


def test_the_note_holds_the_digest_of_the_file(uri):
    note = storage.read_json(uri.replace(".safetensors", ".json"))
    path = storage.local_copy(uri)
    assert path.read_bytes() == b"weights"
    assert note == {"epochs": 3, "sha256": file_digest(path).removeprefix("sha256:")}
    assert file_digest(storage.local_copy(local_weights(uri))) == file_digest(path)


@pytest.mark.parametrize("content", [b"other", b"weightt", b""])
def test_another_file_beside_a_note_is_refused(uri, content):
    storage.publish_bytes(uri, content)
    with pytest.raises(ValueError, match=r"encoder\.safetensors: its SHA-256 is .*replaced or dam"):
        local_weights(uri)
    storage.remove_tree(uri.replace(".safetensors", ".json"))
    assert storage.local_copy(local_weights(uri)).read_bytes() == content


@pytest.mark.parametrize("note", ["{", "[]", "7", "{}", '{"sha256": null}', "[" * 100_000])
def test_a_note_without_a_digest_says_nothing(uri, note):
    storage.publish_text(uri.replace(".safetensors", ".json"), note)
    check_beside(uri, "sha256:" + "0" * 64)


def test_other_files_have_no_note(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"abc")
    (tmp_path / "w.json").write_text('{"sha256": "0"}')
    assert local_weights(str(tmp_path / "w.pth")) == str(tmp_path / "w.pth")
