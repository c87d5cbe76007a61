"""Log-likelihood of counts under the negative binomial distribution, in two forms.

The published code copies both from scvi-tools; these are written from the definition. Everything
runs in float64, since log-gamma of a large argument keeps no digits of its differences in float32.
Bounds keep values and gradients finite where softplus underflows and where a gene shows no
overdispersion at all.
"""

import torch
from torch import Tensor
from torch.nn import functional

# Below these, means and total counts count as these: log 0 would be infinite for a count above 0.
LEAST = 1e-30
# ln of the inverse dispersions that are told apart: beyond, variance is mu or nothing is known.
LOG_DISPERSION = 18.0


def nb_log_prob(counts: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Return log P(counts) of a negative binomial given by mean and inverse dispersion.

    The variance is mu + mu^2 / theta. Equals scipy.stats.nbinom.logpmf(counts, theta,
    theta / (theta + mu)).

    Args:
        counts: Whole numbers, 0 or more; any shape that goes with the others.
        mu: Means, 0 or more (0 counts as 1e-30).
        theta: Inverse dispersions, above 0.

    Returns:
        float64, 0 or less, with finite gradients.
    """
    y, mean, size = counts.double(), mu.double().clamp(min=LEAST), theta.double()
    # log1p of small ratios, not logs of what is close to 1; y log(mu / (theta + mu)) last.
    zeros = -size * torch.log1p(mean / size)
    rest = -y * torch.log1p(size / mean)
    return _choose(y, size) + zeros + rest


def nb_total_log_prob(counts: Tensor, total_count: Tensor, logits: Tensor) -> Tensor:
    """Return log P(counts) of a negative binomial given by total count and logits.

    The mean is total_count * exp(logits). Equals torch.distributions.NegativeBinomial and
    scipy.stats.nbinom.logpmf(counts, total_count, 1 / (1 + exp(logits))).

    Args:
        counts: Whole numbers, 0 or more; any shape that goes with the others.
        total_count: 0 or more (0 counts as 1e-30).
        logits: Log-odds of success.

    Returns:
        float64, 0 or less, with finite gradients.
    """
    y, size, odds = counts.double(), total_count.double().clamp(min=LEAST), logits.double()
    return _choose(y, size) + y * functional.logsigmoid(odds) + size * functional.logsigmoid(-odds)


def inverse_dispersion(log_dispersion: Tensor) -> Tensor:
    """Return theta = exp(g), float64, of a learnt g, bounded to what float64 can tell apart."""
    return log_dispersion.double().clamp(-LOG_DISPERSION, LOG_DISPERSION).exp()


def _choose(y: Tensor, size: Tensor) -> Tensor:
    """Return log of the binomial coefficient, ln G(y + size) - ln G(size) - ln G(y + 1)."""
    return torch.lgamma(y + size) - torch.lgamma(size) - torch.lgamma(y + 1)
