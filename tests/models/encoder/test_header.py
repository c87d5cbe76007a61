"""Headers of encoder files: older versions, and headers that do not fit."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import save_file

from scellst_ray.models.encoder.backbones import new_backbone
from scellst_ray.models.encoder.encoder import (
    encoder_dim,
    encoder_header,
    load_encoder,
)
from scellst_ray.models.encoder.header import Header
from tests.support.encoders import embed


def old_header(arch="resnet50"):
    """Return the metadata that version 1 wrote."""
    header = {"format": "scellst_ray.encoder", "version": "1", "arch": arch}
    return header | {"mean": "[0.5, 0.6, 0.7]", "std": "[0.2, 0.25, 0.3]"}


@pytest.mark.parametrize("drop", [(), ("arch", "format", "version")])
def test_files_of_version_1_are_read_as_resnet50(tmp_path, encoder, crops, drop):
    header = {key: value for key, value in old_header().items() if key not in drop}
    path = tmp_path / "v1.safetensors"
    save_file(encoder.network.state_dict(), path, metadata=header)
    loaded = load_encoder(str(path))
    assert (loaded.mean, loaded.std) == ((0.5, 0.6, 0.7), (0.2, 0.25, 0.3))
    assert (loaded.dim, encoder_dim(str(path))) == (2048, 2048)
    twin = replace(encoder, mean=loaded.mean, std=loaded.std)
    np.testing.assert_array_equal(embed(loaded, crops[:2]), embed(twin, crops[:2]))
    assert encoder_header(str(path)).provenance == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": "vgg16"}, "no architecture 'vgg16'; expected resnet18"),
        ({"arch": "timm:vgg"}, "timm .* has no network 'vgg'"),
        ({"arch": "resnet34"}, "not a ResNet-34 .*tensors are missing"),
        ({"version": "3"}, "format version 3; this release reads up to 2: upgrade"),
        ({"version": "x"}, "cannot be read as weights"),
        ({"format": "scellst_ray.head"}, "it is a scellst_ray.head, expected a"),
        ({"dim": "2048"}, "states embeddings of length 2048, but resnet18 gives 512"),
        ({"dim": "[512]"}, "header is damaged"),
        ({"dim": "1e3"}, "header is damaged"),
        ({"dim": "true"}, "header is damaged"),
        ({"crop_um": "null"}, "header is damaged"),
        ({"crop_um": '"12"'}, "header is damaged"),
        ({"crop_um": "NaN"}, "header is damaged"),
        ({"crop_px": "[48]"}, "header is damaged"),
        ({"crop_px": "48.5"}, "header is damaged"),
        ({"mean": "[0.5]"}, "header is damaged"),
        ({"std": "[0.5, 0, 0.5]"}, "header is damaged"),
        ({"mean": "0.5"}, "header is damaged"),
        ({"provenance": "{"}, "cannot be read as weights"),
        ({"crop_um": "18.0"}, "crops of 18 um and 48 px, and this release cuts 12 um and 48 px"),
        ({"crop_px": "72"}, "crops of 12 um and 72 px, .* pretrain an encoder on such crops"),
    ],
)
def test_headers_that_do_not_fit_are_refused(tmp_path, changes, reason):
    path = tmp_path / "e.safetensors"
    network, _ = new_backbone("resnet18", 0)
    header = Header(arch="resnet18", dim=512).metadata() | changes
    save_file(network.state_dict(), path, metadata=header)
    with pytest.raises(ValueError, match=rf"e\.safetensors.*{reason}"):
        load_encoder(str(path))
