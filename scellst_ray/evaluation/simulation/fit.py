"""The simulation study's fits: the same head from bags or from cells, its learning rate chosen.

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
from scellst_ray.models.mil.stored_head import Formula


class RowHead(MilHead):
    """A head whose instances are rows of one matrix, given by number.

    The study's 100,000 instances are draws of a few thousand cells (of six, with one-hot inputs):
    the matrix is held once, and a batch computes each row once, however often it is in it.

    Attributes:
        matrix_ND: Inputs, not part of the state.
    """

    matrix_ND: Tensor

    def __init__(self, matrix_ND: Tensor, num_genes: int, formula: Formula) -> None:
        """Make a head for the rows of this matrix (seed torch before)."""
        super().__init__(matrix_ND.shape[1], num_genes, formula=formula)
        self.register_buffer("matrix_ND", matrix_ND, persistent=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return expression [L, P] from row numbers, int64 [L, 1]."""
        rows_U, place_L = torch.unique(x_ND[:, 0], return_inverse=True)
        # index_select adds gradients up faster than indexing does.
        return super().forward(self.matrix_ND[rows_U]).index_select(0, place_L)


def row_bags(rows_SK: NDArray[np.int64], targets_SP: NDArray[np.float32]) -> BagSet:
    """Return bags of the same size whose instances are row numbers [S, K]."""
    num_bags, size = rows_SK.shape
    rows_L1 = torch.from_numpy(rows_SK.reshape(-1, 1).astype(np.int64))
    offsets = torch.arange(num_bags + 1, dtype=torch.int64) * size
    return BagSet(rows_L1, offsets, torch.from_numpy(targets_SP))


@dataclass(frozen=True)
class Search:
    """How a head is fitted, and how its learning rate is found.

    Attributes:
        config: Everything but the learning rate.
        learning_rates: Candidates.
        rungs: After so many epochs, ascending, the half of the candidates with the higher
            validation loss is dropped; after the last, all but the best, which is fitted on until
            it stops. The published study fits each to the end and takes the best on the test set.
    """

    config: FitConfig
    learning_rates: Sequence[float]
    rungs: Sequence[int]


@dataclass(frozen=True)
class Fitted:
    """A fitted head and how it came about.

    Attributes:
        head: In eval mode.
        learning_rate: The one chosen.
        num_epochs: Its epochs.
        validation_loss: Its best.
        search: By candidate, the best validation loss until it was dropped (None: it diverged).
    """

    head: RowHead
    learning_rate: float
    num_epochs: int
    validation_loss: float
    search: dict[float, float | None]


class _Candidate:
    """A fit with one learning rate, which goes on where it paused."""

    def __init__(self, head: RowHead, config: FitConfig) -> None:
        self.head, self.config = head, config
        self.state: dict[str, Any] | None = None
        self.loss, self.num_epochs, self.has_stopped = math.inf, 0, False

    def fit_until(self, num_epochs: int, fit: BagSet, val: BagSet) -> float | None:
        """Fit up to this epoch unless it has stopped; return the best loss, None if it diverged."""
        if self.has_stopped:
            return self.loss

        def keep(under_way: Fit) -> None:
            if len(under_way.history) == num_epochs:
                # Copied, since fit_head ends by putting the best weights into the head.
                self.state = copy.deepcopy(under_way.state_dict())

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
    """Fit with every learning rate, dropping the worse on the validation bags as it goes on.

    Args:
        matrix_ND: Inputs of all cells.
        fit_rows_M: The rows that training may see: inputs are standardised by them.
        fit: Training bags of row numbers (see row_bags).
        val: Validation bags.
        search: How.

    Raises:
        ValueError: Every candidate diverged.
    """
    matrix, rows_M = torch.from_numpy(matrix_ND), torch.from_numpy(fit_rows_M)
    candidates = {
        rate: _Candidate(
            _new_head(matrix, rows_M, fit, search.config), replace(search.config, lr=rate)
        )
        for rate in search.learning_rates
    }
    losses: dict[float, float | None] = {}
    alive, limit = list(candidates), search.config.max_epochs
    for rung in [*(rung for rung in search.rungs if rung < limit), limit]:
        for rate in alive:
            losses[rate] = candidates[rate].fit_until(rung, fit, val)
        ranked = sorted((loss, rate) for rate in alive if (loss := losses[rate]) is not None)
        if not ranked:
            message = f"every learning rate of {list(search.learning_rates)} diverged: give lower."
            raise ValueError(message)
        last = rung >= max(r for r in (*search.rungs, 0) if r < limit)
        alive = [rate for _, rate in ranked[: 1 if last else (len(ranked) + 1) // 2]]
    best = candidates[alive[0]]
    return Fitted(best.head.eval(), alive[0], best.num_epochs, best.loss, losses)


def _new_head(matrix_ND: Tensor, fit_rows_M: Tensor, fit: BagSet, config: FitConfig) -> RowHead:
    """Make the head with weights of this seed; torch's global state is left as it was."""
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
