"""The networks of a run, read and identified by the driver before Ray starts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scellst_ray.runs.identity import NetworkIdentity
from scellst_ray.stages.config import ExtractConfig
from scellst_ray.stages.segmenter_settings import WITHOUT_FILE
from scellst_ray.stages.tiles import CellsSpec

if TYPE_CHECKING:
    from scellst_ray.models.cellvit.checkpoint import CellVit


@dataclass(frozen=True)
class CheckedNetworks:
    """The networks of a run, identified.

    Attributes:
        identity: Digests of their weights and the length of embeddings.
        type_names: Nucleus types of the segmenting network, by number; empty without one.
        bytes_on_cpu: Bytes of memory that the segmenting network takes on a CPU.
        head_uri: File of the expression head; None without one.
    """

    identity: NetworkIdentity
    type_names: tuple[str, ...] = ()
    bytes_on_cpu: int = 0
    head_uri: str | None = None


def check_networks(config: ExtractConfig) -> CheckedNetworks:
    """Read the networks' weights before Ray starts, and identify them.

    Raises:
        ValueError: a file of weights does not exist, or does not fit the settings.
    """
    # Torch takes half a gigabyte, which a driver without networks does not need.
    if config.segmenter != "cellvit" and config.encoder in WITHOUT_FILE:
        return CheckedNetworks(NetworkIdentity(encoder=config.encoder, embedding_dim=None))
    from scellst_ray.models.cellvit.checkpoint import load_cellvit  # noqa: PLC0415
    from scellst_ray.models.cellvit.inference import tile_bytes  # noqa: PLC0415
    from scellst_ray.models.encoder.encoder import encoder_digest, encoder_dim  # noqa: PLC0415
    from scellst_ray.models.encoder.weights_file import local_weights  # noqa: PLC0415

    encoder, dim = config.encoder, None
    segmenter_weights = None
    type_names: tuple[str, ...] = ()
    bytes_on_cpu = 0
    if config.segmenter == "cellvit":
        model = load_cellvit(local_weights(str(config.segmenter_weights)))
        segmenter_weights = model.digest
        type_names = model.type_names
        network_bytes = sum(p.nbytes for p in model.network.parameters())
        side = config.core_px + 2 * config.halo_px
        if model.arch.max_px is not None and side > model.arch.max_px:
            message = (
                f"core_px {config.core_px} and two halo_px {config.halo_px} make {side} px; "
                f"CellViT-{model.arch.variant} takes at most {model.arch.max_px}"
            )
            raise ValueError(message)
        bytes_on_cpu = network_bytes + tile_bytes(side, "float32")
        if config.encoder == "tokens":
            encoder = f"tokens:{model.digest}"
        elif config.encoder == "types":
            encoder = f"types:{','.join(type_names)}"
        dim = segmenter_embedding_dim(config.encoder, model)
    if config.encoder not in WITHOUT_FILE:
        weights = local_weights(config.encoder)
        encoder, dim = encoder_digest(weights), encoder_dim(weights)
    identity = NetworkIdentity(
        encoder=encoder,
        embedding_dim=dim if config.store_embeddings else None,
        segmenter_weights=segmenter_weights,
        segmenter_window_px=config.segmenter_window_px,
    )
    return CheckedNetworks(identity, type_names, bytes_on_cpu)


def segmenter_embedding_dim(encoder: str, model: "CellVit | None" = None) -> int | None:
    """Return the length of embeddings that are made without a network of their own.

    Args:
        encoder: 'tokens' or 'types'; for every other encoder the length is None.
        model: The segmenting network; None: the published CellViT-256.
    """
    from scellst_ray.models.cellvit.checkpoint import PANNUKE_TYPES  # noqa: PLC0415
    from scellst_ray.models.cellvit.network import ARCHS  # noqa: PLC0415

    if encoder == "tokens":
        return ARCHS["256"].dim if model is None else model.arch.dim
    if encoder == "types":
        return len(PANNUKE_TYPES if model is None else model.type_names)
    return None


def cells_spec(config: ExtractConfig, networks: CheckedNetworks) -> CellsSpec:
    """Return what the workers compute, from a resolved configuration."""
    return CellsSpec(
        segmenter=config.segmenter,
        read_mpp=config.read_mpp,
        core_px=config.core_px,
        halo_px=config.halo_px,
        encoder=config.encoder,
        precision=config.precision,
        head_uri=networks.head_uri,
        store_embeddings=config.store_embeddings,
        type_names=networks.type_names,
        weights=config.segmenter_weights,
        weights_digest=networks.identity.segmenter_weights,
        encoder_digest=None if config.encoder in WITHOUT_FILE else networks.identity.encoder,
        window_px=config.segmenter_window_px,
        head_digest=networks.identity.head,
    )
