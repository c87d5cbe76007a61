"""Log-likelihood of counts under the negative binomial distribution, in two forms.

The published code copies both forms from scvi-tools. These are written from the definition.
Everything runs in float64, since differences of log-gamma of large arguments have no digits left
in float32. Bounds keep values and gradients finite where softplus underflows and where a gene has
no overdispersion.
"""

import torch
from torch import Tensor
from torch.nn import functional

# Lower bound of means and total counts: log 0 would be infinite for a count above 0.
LEAST = 1e-30
# Bound of |ln theta|. Above it the variance is mu; below it the variance has no useful limit.
LOG_DISPERSION = 18.0


def nb_log_prob(counts: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Return log P(counts) of a negative binomial given by mean and inverse dispersion.

    The variance is mu + mu^2 / theta. Equals scipy.stats.nbinom.logpmf(counts, theta,
    theta / (theta + mu)).

    Args:
        counts: Whole numbers, 0 or more; any shape that broadcasts with the other arguments.
        mu: Means, 0 or more; 0 is replaced by 1e-30.
        theta: Inverse dispersions, above 0.

    Returns:
        float64, 0 or less, with finite gradients.
    """
    y, mean, size = counts.double(), mu.double().clamp(min=LEAST), theta.double()
    # log1p of a small ratio keeps the digits that the log of a number close to 1 would lose.
    zeros = -size * torch.log1p(mean / size)
    rest = -y * torch.log1p(size / mean)
    return _log_choose(y, size) + zeros + rest


def nb_total_log_prob(counts: Tensor, total_count: Tensor, logits: Tensor) -> Tensor:
    """Return log P(counts) of a negative binomial given by total count and logits.

    The mean is total_count * exp(logits). Equals torch.distributions.NegativeBinomial and
    scipy.stats.nbinom.logpmf(counts, total_count, 1 / (1 + exp(logits))).

    Args:
        counts: Whole numbers, 0 or more; any shape that broadcasts with the other arguments.
        total_count: Total counts, 0 or more; 0 is replaced by 1e-30.
        logits: Log-odds of success.

    Returns:
        float64, 0 or less, with finite gradients.
    """
    y, size, odds = counts.double(), total_count.double().clamp(min=LEAST), logits.double()
    return (
        _log_choose(y, size) + y * functional.logsigmoid(odds) + size * functional.logsigmoid(-odds)
    )


def inverse_dispersion(log_dispersion: Tensor) -> Tensor:
    """Return theta = exp(g), float64, of a learnt g; g is bounded to -18..18."""
    return log_dispersion.double().clamp(-LOG_DISPERSION, LOG_DISPERSION).exp()


def _log_choose(y: Tensor, size: Tensor) -> Tensor:
    """Return ln of the binomial coefficient: ln G(y + size) - ln G(size) - ln G(y + 1)."""
    return torch.lgamma(y + size) - torch.lgamma(size) - torch.lgamma(y + 1)
