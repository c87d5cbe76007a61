"""EXPRESSION: one pass from pixels to the last hidden layer of the head, for every cell."""

import hashlib
import logging
from dataclasses import replace
from typing import Any

from scellst_ray import storage
from scellst_ray.models.mil.head import head_from_bytes
from scellst_ray.models.mil.stored_head import HEAD_FILE, read_last_layer
from scellst_ray.models.weights.beside import check_beside
from scellst_ray.models.weights.digests import is_earlier_digest
from scellst_ray.pipelines.extract import run_cells
from scellst_ray.pipelines.progress import Report
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.identity import NetworkIdentity
from scellst_ray.runs.last_layer import write_last_layer
from scellst_ray.runs.records import SlideRecord
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.stages.checked_networks import check_networks
from scellst_ray.stages.config import PredictConfig, encoder_of_head, head_file

logger = logging.getLogger(__name__)


def predict(config: PredictConfig, report: Report = lambda _: None) -> dict[str, SlideRecord]:
    """Run `predict`; return the record of every slide of the manifest.

    Raises:
        ValueError: the manifest, the head, the encoder or the output folder cannot be used, or the
            head was trained with another encoder.
    """
    slides = read_manifest(config.manifest)
    uri = head_file(config.head)
    if not storage.exists(uri):
        message = f"{uri}: no such head; give the folder or file `scellst-ray train` wrote"
        raise ValueError(message)
    content = storage.read_bytes(uri)
    _, info = head_from_bytes(content, uri)
    sha256 = hashlib.sha256(content).hexdigest()
    check_beside(uri, sha256)
    encoder = encoder_of_head(info, uri) if config.encoder == "head" else config.encoder
    config = replace(config, encoder=encoder)
    networks = check_networks(config)
    digest = networks.identity.encoder
    trained_with = info["encoder_digest"]
    if digest != trained_with and not is_earlier_digest(trained_with, digest):
        message = (
            f"{uri}: this head was trained on embeddings of {trained_with}, and encoder "
            f"{encoder!r} is {digest}; give the encoder it was trained with"
        )
        raise ValueError(message)
    _warn_of_changes(config, networks.identity, info)
    identity = replace(networks.identity, head=sha256)
    kept = storage.join(storage.absolute(config.out), HEAD_FILE)

    def keep_head(run: RunFolder) -> None:
        """Copy the head into the run, so that readers of the run need no other file."""
        storage.publish_bytes(kept, content)
        write_last_layer(run.uri, read_last_layer(kept, sha256), run.digest)

    return run_cells(
        "predict",
        config,
        slides,
        replace(networks, identity=identity, head_uri=kept),
        report,
        prepare=keep_head,
    )


def _warn_of_changes(
    config: PredictConfig, identity: NetworkIdentity, info: dict[str, Any]
) -> None:
    """Warn if cells are found in another way than those the head was trained on."""
    settings = {
        "segmenter": config.segmenter,
        "segmenter_weights": identity.segmenter_weights or config.segmenter_weights,
        "read_mpp": config.read_mpp,
    }
    for name, now in settings.items():
        then = info.get("cells", {}).get(name, now)
        if then != now:
            logger.warning("%s is %s, but the head was trained with %s", name, now, then)
