"""Identity of a run: every setting that changes results, and the digest of all of them.

A folder holds one run, so a command with another identity is refused. A field that a job does not
use is left out of the JSON text. So a new field changes no digest of an earlier run.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, TypedDict, cast

from scellst_ray import storage
from scellst_ray.core.version import __version__
from scellst_ray.models.weights.digests import is_earlier_digest

OF_EACH_SLIDE: Literal["of each slide"] = "of each slide"


class Identity(Protocol):
    """Identity of the run of one job."""

    def as_json(self) -> Mapping[str, object]:
        """Return the fields as `run.json` holds them."""


@dataclass(frozen=True, kw_only=True)
class NetworkIdentity:
    """Networks of a run of `extract` or `predict`.

    Attributes:
        encoder: Digest of the encoder, see FORMAT.md.
        embedding_dim: Length of the stored embeddings; None if none are stored.
        segmenter_weights: Digest of the segmenting network; None without one.
        segmenter_window_px: Window of its edge scaling in px; None: the tile.
        head: SHA-256 of the head's file; None for `extract`.
    """

    encoder: str
    embedding_dim: int | None
    segmenter_weights: str | None = None
    segmenter_window_px: int | None = None
    head: str | None = None

    def as_json(self) -> dict[str, object]:
        """Return the fields as `run.json` holds them; those of absent networks are left out."""
        fields = asdict(self)
        if self.segmenter_weights is None:
            del fields["segmenter_weights"], fields["segmenter_window_px"]
        if self.head is None:
            del fields["head"]
        return fields


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Identity of a run of `extract` or `predict`.

    Attributes:
        networks: The networks.
        segmenter: Name of the segmenter.
        segmenter_version: Version of the segmenter.
        read_mpp: um per px at which tiles are read; None: each slide's own choice.
        core_px: Side of a tile's core, px.
        halo_px: Margin around the core that is read too, px.
        store_embeddings: Whether CELLS hold embeddings.
        precision: Number format of the networks.
        colours: Set if each slide's own colours normalise its crops.
    """

    networks: NetworkIdentity
    segmenter: str
    segmenter_version: int
    read_mpp: float | None
    core_px: int
    halo_px: int
    store_embeddings: bool
    precision: str
    colours: Literal["of each slide"] | None = None

    def as_json(self) -> dict[str, object]:
        """Return the fields as `run.json` holds them, those of the networks among them."""
        fields = asdict(self)
        del fields["networks"]
        if self.colours is None:
            del fields["colours"]
        return fields | self.networks.as_json()


class StoredIdentity(TypedDict, total=False):
    """`identity` as `run.json` holds it, for any job and any release.

    Fields are those of `RunIdentity` and `NetworkIdentity`, then those of `pretrain`. A field may
    be absent: jobs differ in their fields, and earlier releases did not write all of them.

    Attributes:
        job: The command.
        scellst_ray: The release.
        recipe: `pretrain` only: settings of the training.
        crops: `pretrain` only: digest of the crops.
        init: `pretrain` only: digest of the first weights.
    """

    job: str
    scellst_ray: str
    encoder: str
    embedding_dim: int | None
    segmenter: str
    segmenter_version: int
    segmenter_weights: str
    segmenter_window_px: int | None
    head: str
    read_mpp: float | None
    core_px: int
    halo_px: int
    store_embeddings: bool
    precision: str
    colours: str
    recipe: dict[str, object]
    crops: str
    init: str


def stored_identity(
    job: str, identity: Identity | Mapping[str, object]
) -> tuple[StoredIdentity, str]:
    """Return an identity as `run.json` holds it, and its digest.

    Args:
        job: The command.
        identity: The settings that change its results, or their fields as `run.json` holds them.

    Returns:
        The identity with job and release, and the first 16 hex digits of its SHA-256.
    """
    settings = identity if isinstance(identity, Mapping) else identity.as_json()
    fields = {"job": job, "scellst_ray": __version__, **settings}
    text = json.dumps(fields, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return cast("StoredIdentity", json.loads(text)), digest


def is_earlier_form(found: Mapping[str, object], wanted: Mapping[str, object]) -> bool:
    """Return whether an identity differs only by weights that it knows by their name alone.

    Args:
        found: Identity in the run.json of an earlier release.
        wanted: Identity of the command.
    """
    keys = {key for key in {*found, *wanted} if found.get(key) != wanted.get(key)}
    weights = keys <= {"encoder", "init"}
    return weights and all(is_earlier_digest(found.get(key), wanted.get(key)) for key in keys)


def check_identity(uri: str, identity: object, digest: str) -> None:
    """Refuse a run.json whose digest is not that of its identity.

    Raises:
        DamagedFileError: a part of it was changed.
    """
    text = json.dumps(identity, sort_keys=True)
    if hashlib.sha256(text.encode()).hexdigest()[:16] != digest:
        raise storage.DamagedFileError(uri, "is damaged: its digest is not that of `identity`")
