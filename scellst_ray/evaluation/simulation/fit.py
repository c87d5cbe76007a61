"""Fits of the simulation study: one head, trained on bags or cells, with a learning rate search.

Shape letters: N image cells, L instances, S spots, K cells of a spot, P genes, D embedding.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scellst_ray.models.mil.bags import BagSet
from scellst_ray.models.mil.fit import Fit, FitConfig, fit_head
from scellst_ray.models.mil.head import MilHead
from scellst_ray.models.mil.head_file import Formula


class RowHead(MilHead):
    """A head whose instances are row numbers of one matrix.

    The study's 100,000 instances are draws of a few thousand cells (of six with one-hot inputs). So
    the matrix is held once, and a batch computes each row once, however often it occurs.

    Attributes:
        matrix_ND: Inputs of all cells. They are not part of the state dict.
    """

    matrix_ND: Tensor

    def __init__(self, matrix_ND: Tensor, num_genes: int, formula: Formula) -> None:
        """Make a head for the rows of this matrix; its weights come from torch's global seed."""
        super().__init__(matrix_ND.shape[1], num_genes, formula=formula)
        self.register_buffer("matrix_ND", matrix_ND, persistent=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return expression [L, P] from row numbers, int64 [L, 1]."""
        rows_U, place_L = torch.unique(x_ND[:, 0], return_inverse=True)
        # index_select adds up gradients faster than indexing.
        return super().forward(self.matrix_ND[rows_U]).index_select(0, place_L)


def row_bags(rows_SK: NDArray[np.int64], targets_SP: NDArray[np.float32]) -> BagSet:
    """Return bags of equal size whose instances are row numbers [S, K]."""
    num_bags, size = rows_SK.shape
    rows_L1 = torch.from_numpy(rows_SK.reshape(-1, 1).astype(np.int64))
    offsets = torch.arange(num_bags + 1, dtype=torch.int64) * size
    return BagSet(rows_L1, offsets, torch.from_numpy(targets_SP))


@dataclass(frozen=True)
class Search:
    """Settings of a fit and of the search for its learning rate.

    Candidates are dropped by successive halving. The published study instead fits every candidate
    to the end and takes the best on the test set.

    Attributes:
        config: Settings of the fit, except the learning rate.
        learning_rates: Candidates.
        rungs: Numbers of epochs, ascending. After each, the half of the candidates with the higher
            validation loss is dropped. After the last, only the best candidate goes on.
    """

    config: FitConfig
    learning_rates: Sequence[float]
    rungs: Sequence[int]


@dataclass(frozen=True)
class Fitted:
    """A fitted head and the numbers of its fit.

    Attributes:
        head: The head, in eval mode.
        learning_rate: The chosen learning rate.
        num_epochs: Epochs fitted.
        validation_loss: Lowest validation loss.
        search: Lowest validation loss by candidate, until it was dropped; None: it diverged.
    """

    head: RowHead
    learning_rate: float
    num_epochs: int
    validation_loss: float
    search: dict[float, float | None]


class _Candidate:
    """A fit with one learning rate that can be paused and continued."""

    def __init__(self, head: RowHead, config: FitConfig) -> None:
        self.head, self.config = head, config
        self.state: dict[str, Any] | None = None
        self.loss, self.num_epochs, self.has_stopped = math.inf, 0, False

    def fit_until(self, num_epochs: int, fit: BagSet, val: BagSet) -> float | None:
        """Fit up to this epoch unless it has stopped; return the lowest loss (None: diverged)."""
        if self.has_stopped:
            return self.loss

        def keep(current_fit: Fit) -> None:
            if len(current_fit.history) == num_epochs:
                # Copied, since fit_head loads the best weights into the head at its end.
                self.state = copy.deepcopy(current_fit.state_dict())

        config = replace(self.config, max_epochs=num_epochs)
        try:
            result = fit_head(self.head, fit, val, config, state=self.state, each_epoch=keep)
        except FloatingPointError:
            return None
        self.loss, self.num_epochs = result.best_loss, len(result.history)
        self.has_stopped = self.num_epochs < num_epochs
        return self.loss if math.isfinite(self.loss) else None


def fit_rows(
    matrix_ND: NDArray[np.float32],
    fit_rows_M: NDArray[np.int64],
    fit: BagSet,
    val: BagSet,
    search: Search,
) -> Fitted:
    """Fit with every learning rate; drop candidates that are worse on the validation bags.

    Args:
        matrix_ND: Inputs of all cells.
        fit_rows_M: Rows of the training cells; inputs are standardised with their statistics.
        fit: Training bags of row numbers (see row_bags).
        val: Validation bags of row numbers.
        search: Settings of the fit and of the search.

    Raises:
        ValueError: every candidate diverged.
    """
    matrix, rows_M = torch.from_numpy(matrix_ND), torch.from_numpy(fit_rows_M)
    candidates = {
        rate: _Candidate(
            _new_head(matrix, rows_M, fit, search.config), replace(search.config, lr=rate)
        )
        for rate in search.learning_rates
    }
    losses: dict[float, float | None] = {}
    remaining, limit = list(candidates), search.config.max_epochs
    for rung in [*(rung for rung in search.rungs if rung < limit), limit]:
        for rate in remaining:
            losses[rate] = candidates[rate].fit_until(rung, fit, val)
        ranked = sorted((loss, rate) for rate in remaining if (loss := losses[rate]) is not None)
        if not ranked:
            message = (
                f"all learning rates {list(search.learning_rates)} diverged. Give lower rates."
            )
            raise ValueError(message)
        is_last = rung >= max(r for r in (*search.rungs, 0) if r < limit)
        remaining = [rate for _, rate in ranked[: 1 if is_last else (len(ranked) + 1) // 2]]
    best = candidates[remaining[0]]
    return Fitted(best.head.eval(), remaining[0], best.num_epochs, best.loss, losses)


def _new_head(matrix_ND: Tensor, fit_rows_M: Tensor, fit: BagSet, config: FitConfig) -> RowHead:
    """Make a head with weights of this seed; torch's global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = RowHead(matrix_ND, fit.targets_SG.shape[1], config.formula())
    head.standardise(matrix_ND[fit_rows_M])
    return head


@torch.no_grad()
def predict_rows(
    head: RowHead, rows_M: NDArray[np.int64], block: int = 4096
) -> NDArray[np.float32]:
    """Return the expression of these cells, float32 [M, P]."""
    rows = torch.from_numpy(rows_M.astype(np.int64))[:, None]
    return np.concatenate([head(part).numpy() for part in torch.split(rows, block)])
