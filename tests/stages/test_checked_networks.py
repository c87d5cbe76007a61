"""Networks are identified before Ray starts."""

from types import SimpleNamespace

from scellst_ray.models.cellvit.network import ARCHS
from scellst_ray.stages.checked_networks import check_networks, segmenter_embedding_dim
from scellst_ray.stages.config import ExtractConfig


def test_without_networks_nothing_is_read():
    networks = check_networks(ExtractConfig(manifest="m.csv", out="o", encoder="none"))
    assert (networks.identity.encoder, networks.identity.embedding_dim) == ("none", None)
    assert (networks.type_names, networks.bytes_on_cpu) == ((), 0)


def test_lengths_of_the_published_network():
    assert segmenter_embedding_dim("tokens") == 384
    assert segmenter_embedding_dim("types") == 6
    assert segmenter_embedding_dim("none") is None


def test_lengths_of_another_network():
    model = SimpleNamespace(arch=ARCHS["SAM-H"], type_names=("Background", "Nucleus"))
    assert segmenter_embedding_dim("tokens", model) == 1280
    assert segmenter_embedding_dim("types", model) == 2
    assert segmenter_embedding_dim("none", model) is None
