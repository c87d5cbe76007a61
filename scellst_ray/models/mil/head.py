"""The multiple-instance (MIL) head: it predicts expression of genes from embeddings of cells.

Shape letters: N cells (instances), S spots (bags), D embedding, K members of an ensemble (mostly
1), H hidden (256), G genes.

The method is that of sCellST (Chadoutaud et al., Nature Communications 2026):

- A multilayer perceptron with three hidden layers of 256 and a softplus predicts every cell.
- A spot is the mean of its cells.
- The loss is the squared error against the spot's expression, or the negative binomial likelihood
  of its counts. The mean of the counts is the spot's size factor times the mean of its cells. (The
  published code multiplies by the labels instead.)

The published code has parts that are not in its paper: LeakyReLU with slope 0.01 (here ReLU),
dropout 0.1 (here none), softplus with beta 20 (here 1). PUBLISHED has these parts.

Two departures are ours:

- Inputs are standardised with the mean and deviation of the training instances, since pooled
  ResNet features have very unequal scales. The head holds both.
- A head for counts predicts multiples of each gene's mean, since counts have unequal scales, too.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn
from torch.nn import functional

from scellst_ray import storage
from scellst_ray.models.mil import likelihood
from scellst_ray.models.mil.head_file import (
    HEAD_FORMAT,
    HEAD_VERSION,
    Formula,
    check_head,
    parse_head,
)

HIDDEN_DIM = 256
OURS = Formula()
PUBLISHED = Formula(negative_slope=0.01, dropout=0.1, beta=20.0)
PREDICTORS = {"ours": OURS, "published": PUBLISHED}


def formula_of(predictor: str, loss: str = "mse", ensemble: int = 1) -> Formula:
    """Return the formula of `ours` or `published` with a loss and a number of members.

    Raises:
        ValueError: There is no such predictor or loss.
    """
    if predictor not in PREDICTORS:
        message = f"predictor is {predictor!r}, expected one of {', '.join(PREDICTORS)}."
        raise ValueError(message)
    return replace(PREDICTORS[predictor], loss=loss, ensemble=ensemble)  # type: ignore[arg-type]


def split_members(x_NI: Tensor, num_members: int) -> Tensor:
    """Return [N, K * I] as [N, K, I]; N may be 0."""
    return x_NI.reshape(len(x_NI), num_members, x_NI.shape[1] // num_members)


class GroupedLinear(nn.Linear):
    """K linear layers in one, each on its own part of the input; the weight is [K * out, in].

    With K = 1 it is nn.Linear. With more, the initial weights are those of K separate layers.
    """

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        """Make K = `groups` layers from in_features to out_features."""
        super().__init__(in_features, groups * out_features)
        self.groups = groups

    def forward(self, x_NI: Tensor) -> Tensor:
        """Return [N, K * out] from [N, K * in]."""
        if self.groups == 1:
            return super().forward(x_NI)
        x_KNI = split_members(x_NI, self.groups).transpose(0, 1)
        weight_KIO = self.weight.view(self.groups, -1, self.in_features).transpose(1, 2)
        bias_K1O = self.bias.view(self.groups, 1, -1)
        return torch.baddbmm(bias_K1O, x_KNI, weight_KIO).transpose(0, 1).flatten(1)


class MilHead(nn.Module):
    """A network that predicts expression of G genes for a cell from its embedding.

    An ensemble is K such networks (members) in one: tensors are K times as long. Members share
    the inputs and their standardisation, and nothing else.

    Attributes:
        formula: Formula of the head.
        mean_D: Buffer that is subtracted from embeddings; zeros until standardise is called.
        std_D: Buffer that embeddings are divided by; ones until standardise is called.
        gene_scale_G: Buffer that multiplies the softplus. Only heads for counts have it.
        log_dispersion: Parameter [K * G]: ln theta (nb) or logits (nb_total). Only heads for
            counts have it.
    """

    mean_D: Tensor
    std_D: Tensor
    gene_scale_G: Tensor

    def __init__(
        self,
        embedding_dim: int,
        num_genes: int,
        hidden_dim: int = HIDDEN_DIM,
        formula: Formula = OURS,
    ) -> None:
        """Make a head with torch's default initialisation; seed torch before the call."""
        super().__init__()
        self.formula, groups = formula, formula.ensemble
        self.register_buffer("mean_D", torch.zeros(embedding_dim))
        self.register_buffer("std_D", torch.ones(embedding_dim))
        layers: list[nn.Module] = []
        for layer in (
            nn.Linear(embedding_dim, groups * hidden_dim),
            GroupedLinear(hidden_dim, hidden_dim, groups),
            GroupedLinear(hidden_dim, hidden_dim, groups),
        ):
            slope = formula.negative_slope
            layers += [layer, nn.LeakyReLU(slope) if slope else nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.last = GroupedLinear(hidden_dim, num_genes, groups)
        if formula.counts:
            self.register_buffer("gene_scale_G", torch.ones(num_genes))
            self.log_dispersion = nn.Parameter(torch.zeros(groups * num_genes))

    def standardise(self, embeddings_ND: Tensor) -> None:
        """Set the input standardisation from the training instances [N, D].

        A feature that never varies gets deviation 1. Sums run in float64 over blocks, so that
        large float16 inputs are never copied as a whole.
        """
        mean_D, std_D = instance_statistics(embeddings_ND)
        self.mean_D.copy_(mean_D)
        self.std_D.copy_(std_D)

    def hidden(self, x_ND: Tensor) -> Tensor:
        """Return the last hidden layer [N, K * H] from embeddings [N, D]."""
        h_NH = (x_ND.to(self.mean_D.dtype) - self.mean_D).mul_(self.std_D.reciprocal())
        for layer in self.layers:
            h_NH = layer(h_NH)
            if self.formula.dropout and not isinstance(layer, nn.Linear):
                h_NH = functional.dropout(h_NH, self.formula.dropout, self.training)
        return h_NH

    def members(self, h_NH: Tensor) -> Tensor:
        """Return each member's positive output [N, K * G] from the last hidden layer.

        The output is expression. With loss nb_total it is the total count: expression over
        exp(logits).
        """
        z_NG = self.last(h_NH.to(self.last.weight.dtype))
        y_NG: Tensor = functional.softplus(z_NG, self.formula.beta)
        if not self.formula.counts:
            return y_NG
        return (split_members(y_NG, self.formula.ensemble) * self.gene_scale_G).flatten(1)

    def from_hidden(self, h_NH: Tensor) -> Tensor:
        """Return expression [N, G], the mean over members, from the last hidden layer."""
        return self._expression_NKG(h_NH).mean(1)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return each member's positive output [N, K * G] from embeddings [N, D], for training.

        See `members`. For a single network without nb_total it is the expression.
        """
        return self.members(self.hidden(x_ND))

    def dispersions(self) -> Tensor:
        """Return ln theta (nb) or logits (nb_total) [K, G] of a head for counts."""
        return self.log_dispersion.view(self.formula.ensemble, -1)

    def _expression_NKG(self, h_NH: Tensor) -> Tensor:
        y_NKG = split_members(self.members(h_NH), self.formula.ensemble)
        return y_NKG * self.dispersions().exp() if self.formula.loss == "nb_total" else y_NKG


def instance_statistics(embeddings_ND: Tensor, block: int = 8192) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each feature, float32 [D]; a deviation of 0 becomes 1.

    Args:
        embeddings_ND: Instances.
        block: Number of instances that are converted to float64 at a time.

    Raises:
        ValueError: There are no instances, or a value is not finite.
    """
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


def loss_sum(
    head: MilHead, prediction_SG: Tensor, target_SG: Tensor, size_factor_S: Tensor | None = None
) -> Tensor:
    """Return the loss summed over spots, members and genes.

    The published loss is the mean over spots and genes.

    Args:
        head: Head; it defines the loss and holds the dispersions.
        prediction_SG: Mean of the members' outputs over each spot's cells [S, K * G].
        target_SG: Scaled expression [S, G] for mse, counts for nb and nb_total.
        size_factor_S: Size factor of each spot [S]; needed for counts.

    Returns:
        Sum of squared errors, or of negative log-likelihoods in float64. There a spot's mean (nb)
        or total count (nb_total) is its size factor times the prediction. Without spots the
        result is 0 and has a gradient.

    Raises:
        ValueError: Counts have no size factors.
    """
    formula = head.formula
    prediction_SKG = split_members(prediction_SG, formula.ensemble)
    target_S1G = target_SG[:, None]
    total: Tensor
    if not formula.counts:
        total = (prediction_SKG - target_S1G).square().sum()
        return total
    if size_factor_S is None:
        message = (
            f"loss {formula.loss!r} needs the size factor of every spot, got no size factors: give "
            "counts with size factors, or train with loss mse."
        )
        raise ValueError(message)
    at_spot_SKG = prediction_SKG.double() * size_factor_S[:, None, None]
    if formula.loss == "nb":
        theta_KG = likelihood.inverse_dispersion(head.dispersions())
        total = -likelihood.nb_log_prob(target_S1G, at_spot_SKG, theta_KG).sum()
    else:
        total = -likelihood.nb_total_log_prob(target_S1G, at_spot_SKG, head.dispersions()).sum()
    return total


def stored_hidden(h_NH: Tensor) -> Tensor:
    """Return the last hidden layer rounded to float16, as it is stored.

    Stored expression is defined by these rounded values. Therefore expression is the same before
    writing and after reading.

    Raises:
        ValueError: A value is above 65,504 and does not fit into float16. Either the head has
            diverged, or the embeddings are not from its encoder.
    """
    rounded = h_NH.to(torch.float16)
    if not torch.isfinite(rounded).all():
        message = (
            f"hidden values up to {float(h_NH.abs().max())} do not fit into float16 (65504). "
            "Either the head has diverged: train it again with a lower learning rate. Or the "
            "embeddings come from another encoder: use the one that the head was trained with."
        )
        raise ValueError(message)
    return rounded


def head_to_bytes(head: MilHead, info: Mapping[str, Any]) -> bytes:
    """Return a head as the bytes of a safetensors file with JSON metadata.

    Args:
        head: The head.
        info: `genes` (the panel, in order), `scaling` (one divisor per gene for each training
            slide), `embedding_dim`, `encoder_digest`, `training_slides` and `metrics`. Other keys
            are kept if JSON can hold them.

    Raises:
        ValueError: A key of info is missing, info does not describe this head, or the head holds
            numbers that are not finite.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    arrays = {name: value.numpy() for name, value in tensors.items()}
    check_head(arrays, info, head.formula, "head")
    metadata = {
        "format": HEAD_FORMAT,
        "format_version": str(HEAD_VERSION),
        "info": json.dumps(dict(info), sort_keys=True),
        "formula": json.dumps(asdict(head.formula), sort_keys=True),
    }
    return tensors_to_bytes(tensors, metadata=metadata)


def head_from_bytes(
    data: bytes, source: str, sha256: str | None = None
) -> tuple[MilHead, dict[str, Any]]:
    """Return the head (in eval mode, on the CPU) and its info; for arguments see parse_head."""
    stored = parse_head(data, source, sha256)
    num_genes, hidden_dim = len(stored.info["genes"]), stored.tensors["last.weight"].shape[1]
    head = MilHead(len(stored.tensors["mean_D"]), num_genes, hidden_dim, stored.formula)
    head.load_state_dict({name: torch.tensor(value) for name, value in stored.tensors.items()})
    return head.eval(), stored.info


def save_head(path: str, head: MilHead, info: Mapping[str, Any]) -> None:
    """Write a head to a path or any fsspec address; a reader never finds a part of it.

    Raises:
        ValueError: See head_to_bytes.
    """
    data = head_to_bytes(head, info)

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    storage.publish(path, write)


def load_head(path: str, sha256: str | None = None) -> tuple[MilHead, dict[str, Any]]:
    """Read a head from a path or any fsspec address.

    Args:
        path: The file.
        sha256: SHA-256 of the expected head in hex; None: any head.

    Returns:
        The head in eval mode on the CPU, and its info.

    Raises:
        ValueError: The file does not exist, is cut off, is no head or not the expected head.
    """
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        message = f"{path}: no such head; give the file that `scellst-ray train` wrote."
        raise ValueError(message) from error
    return head_from_bytes(data, path, sha256)
