"""The multiple-instance head: embeddings of cells in, expression of genes out.

Shape letters: N cells (instances), S spots (bags), D embedding, H hidden (256), G genes.

After sCellST (Chadoutaud et al., Nature Communications 2026): an MLP with three hidden layers of
256 and a softplus predicts every cell; a spot is the mean of its cells; the loss is the squared
error against the spot's expression. The published code has parts its paper has not: LeakyReLU
with slope 0.01 (here ReLU), dropout 0.1 (here none), softplus with beta 20 (here 1). One
departure is ours: inputs are standardised with the mean and deviation of the training instances,
held in the head, since pooled ResNet features have very unequal scales.
"""

import json
from collections.abc import Mapping
from typing import Any

import fsspec
import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn
from torch.nn import functional

from scellst_ray.expression import (
    HEAD_FORMAT,
    HEAD_VERSION,
    check_info,
    expression_from_hidden,  # noqa: F401 - the numpy twin of from_hidden, found here too
    parse_head,
)

HIDDEN_DIM = 256


class MilHead(nn.Module):
    """Predicts expression of G genes for one cell from its embedding.

    Attributes:
        mean_D: Buffer subtracted from embeddings; zeros until standardise is called.
        std_D: Buffer they are divided by; ones until then.
    """

    mean_D: Tensor
    std_D: Tensor

    def __init__(self, embedding_dim: int, num_genes: int, hidden_dim: int = HIDDEN_DIM) -> None:
        """Make a head with torch's default initialisation (seed torch before)."""
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(embedding_dim))
        self.register_buffer("std_D", torch.ones(embedding_dim))
        self.layers = nn.Sequential(
            nn.Linear(embedding_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
        )
        self.last = nn.Linear(hidden_dim, num_genes)

    def standardise(self, embeddings_ND: Tensor) -> None:
        """Set the input standardisation from the training instances [N, D].

        A feature that never varies keeps deviation 1. Sums run in float64 over blocks, so that
        large float16 inputs are never copied whole.
        """
        mean_D, std_D = instance_statistics(embeddings_ND)
        self.mean_D.copy_(mean_D)
        self.std_D.copy_(std_D)

    def hidden(self, x_ND: Tensor) -> Tensor:
        """Return the last hidden layer [N, H], never negative, from embeddings [N, D]."""
        h_NH: Tensor = self.layers((x_ND.to(self.mean_D.dtype) - self.mean_D) / self.std_D)
        return h_NH

    def from_hidden(self, h_NH: Tensor) -> Tensor:
        """Return expression [N, G], positive, from the last hidden layer [N, H]."""
        return functional.softplus(self.last(h_NH.to(self.last.weight.dtype)))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return expression [N, G] from embeddings [N, D]."""
        return self.from_hidden(self.hidden(x_ND))


def instance_statistics(embeddings_ND: Tensor, block: int = 8192) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (0 replaced by 1) of each feature, float32 [D] each."""
    count = len(embeddings_ND)
    if count == 0:
        message = "no instances to standardise by: link cells to spots before fitting."
        raise ValueError(message)
    blocks = torch.split(embeddings_ND, block)
    mean_D = sum((part.double().sum(0) for part in blocks), torch.zeros(())) / count
    square_D = sum((((part.double() - mean_D) ** 2).sum(0) for part in blocks), torch.zeros(()))
    if not torch.isfinite(square_D).all():
        message = "embeddings hold NaN or infinity: embed again before fitting."
        raise ValueError(message)
    std_D = (square_D / count).sqrt().float()
    constant_D = std_D <= 1e-6 * mean_D.abs().clamp(min=1e-6).float()
    return mean_D.float(), torch.where(constant_D, 1.0, std_D)


def check_offsets(offsets: Tensor, num_instances: int) -> None:
    """Refuse offsets [S + 1] that do not cut num_instances into S bags, none of them empty.

    Raises:
        ValueError: Naming the first empty bag: an empty bag has no mean, and NaN would spread.
    """
    sizes = offsets.diff()
    if offsets.ndim != 1 or len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != num_instances:
        message = (
            f"bag offsets of shape {tuple(offsets.shape)} from "
            f"{offsets.flatten()[:1].tolist()} to {offsets.flatten()[-1:].tolist()}, expected "
            f"one-dimensional, from 0 to the number of instances, {num_instances}."
        )
        raise ValueError(message)
    if len(sizes) and int(sizes.min()) <= 0:
        bag = int((sizes <= 0).nonzero()[0, 0])
        message = (
            f"bag {bag} of {len(sizes)} holds {int(sizes[bag])} instances, expected at least 1. "
            "Drop spots without cells before making bags."
        )
        raise ValueError(message)


def bag_mean(y_NG: Tensor, offsets: Tensor) -> Tensor:
    """Return the mean of each bag [S, G]; bag s is y_NG[offsets[s]:offsets[s + 1]], not padded.

    Raises:
        ValueError: Where the offsets do not fit or a bag is empty.
    """
    check_offsets(offsets, len(y_NG))
    if len(offsets) == 1:
        return y_NG  # no bags and so no rows, but still part of the graph
    lengths = offsets.diff().to(y_NG.device)
    return torch.segment_reduce(y_NG, "mean", lengths=lengths, axis=0, unsafe=True)


def mil_loss(prediction_SG: Tensor, target_SG: Tensor, global_spots: int | None = None) -> Tensor:
    """Return the squared error, averaged over spots and genes.

    Args:
        prediction_SG: Predicted expression of this worker's spots [S, G].
        target_SG: Measured expression [S, G].
        global_spots: Spots in the batch over all workers. With it, the sum of the workers' losses
            is the loss of one process; a worker without spots contributes 0, with a gradient.
    """
    num_spots = len(target_SG) if global_spots is None else global_spots
    squared: Tensor = (prediction_SG - target_SG).square().sum()
    return squared / (num_spots * target_SG.shape[1])


def stored_hidden(h_NH: Tensor) -> Tensor:
    """Round the last hidden layer to the float16 that is stored.

    Stored expression is defined by this rounded factor, so what is read equals what was written.

    Raises:
        ValueError: Where a value does not fit into float16 (above 65,504): the head has diverged
            or the embeddings are not from its encoder.
    """
    rounded = h_NH.to(torch.float16)
    if not torch.isfinite(rounded).all():
        message = (
            f"hidden values up to {float(h_NH.max())} do not fit into float16 (65504). The head "
            "has diverged, or these embeddings come from another encoder than it was trained on."
        )
        raise ValueError(message)
    return rounded


def head_to_bytes(head: MilHead, info: Mapping[str, Any]) -> bytes:
    """Serialise a head as safetensors with JSON metadata.

    Args:
        head: The head.
        info: `genes` (ordered panel), `scaling` (per training slide, one divisor per gene),
            `embedding_dim`, `encoder_digest`, `training_slides`, `metrics`; anything else that
            JSON holds is kept.

    Raises:
        ValueError: Where info lacks a key or does not describe this head.
    """
    check_info(info, head.state_dict(), "head")
    text = json.dumps(dict(info), sort_keys=True)
    metadata = {"format": HEAD_FORMAT, "format_version": str(HEAD_VERSION), "info": text}
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    return tensors_to_bytes(tensors, metadata=metadata)


def head_from_bytes(data: bytes, source: str) -> tuple[MilHead, dict[str, Any]]:
    """Return the head (in eval mode, on the CPU) and its info; `source` is named in errors."""
    tensors, info = parse_head(data, source, parse_tensors)
    num_genes, hidden_dim = tensors["last.weight"].shape
    head = MilHead(int(info["embedding_dim"]), num_genes, hidden_dim)
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        message = f"{source}: tensors do not fit a MIL head: {error}"
        raise ValueError(message) from error
    return head.eval(), info


def save_head(path: str, head: MilHead, info: Mapping[str, Any]) -> None:
    """Write a head (see head_to_bytes) to a path or any fsspec address, whole or not at all."""
    data = head_to_bytes(head, info)
    fs, target = fsspec.core.url_to_fs(path)
    fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
    fs.pipe_file(f"{target}.partial", data)
    fs.mv(f"{target}.partial", target)


def load_head(path: str) -> tuple[MilHead, dict[str, Any]]:
    """Read a head from a path or any fsspec address.

    Returns:
        The head in eval mode on the CPU, and its info (genes in order, scaling, ...).

    Raises:
        ValueError: Where there is no file, it is cut, or it is something else.
    """
    try:
        with fsspec.open(path, "rb") as file:
            data = bytes(file.read())
    except FileNotFoundError as error:
        message = f"{path}: no such head. Give the file that `scellst-ray train` wrote."
        raise ValueError(message) from error
    return head_from_bytes(data, path)
