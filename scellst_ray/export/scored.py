"""Scores of cell types in exports, where `annotate` has added them to the run."""

import logging

import pyarrow as pa

from scellst_ray.core.logs import log_fields
from scellst_ray.runs.reading import Run
from scellst_ray.runs.scores import read_scores, read_scores_info
from scellst_ray.storage import DamagedFileError

logger = logging.getLogger(__name__)
BEST_TYPE = "best_type"


class CellScores:
    """The scores of a run's cells; what cannot be used is told, and left out.

    Attributes:
        columns: Columns of scores, one a type; none if the run has no scores.
    """

    def __init__(self, run: Run) -> None:
        """Look which scores a run has."""
        self._run = run
        try:
            self._info = read_scores_info(run.uri)
        except DamagedFileError as error:
            logger.warning("exported without scores: %s", error)
            self._info = None
        types = [] if self._info is None else self._info["types"]
        self.columns = tuple(each["column"] for each in types)

    def of(self, slide_id: str) -> pa.Table | None:
        """Return BEST_TYPE and the scores of a slide's cells, in their order; None without."""
        if self._info is None:
            return None
        problem = "it was finished after `scellst-ray annotate`; run that again"
        try:
            table = read_scores(self._run, slide_id, (BEST_TYPE, *self.columns), self._info)
        except (DamagedFileError, FileNotFoundError) as error:
            table, problem = None, str(error)
        if table is None:
            text = "slide %s is exported without scores: %s"
            logger.warning(text, slide_id, problem, extra=log_fields(slide_id))
        return table
