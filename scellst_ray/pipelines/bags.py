"""BAGS: the embeddings of a spot's cells, and its target expression. One file holds one slide."""

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
from ray.data import ActorPoolStrategy

from scellst_ray.pipelines.ray_internals import dataset_of, hide_progress_bars
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.bags import RESULT, make_bags
from scellst_ray.stages.supervision import DEFAULT_RULES, Rules, TrainingSlide


class _Bags:
    def __init__(
        self,
        slides: dict[str, TrainingSlide],
        panel: Sequence[str],
        run: RunFolder,
        out: str,
        rules: Rules,
    ) -> None:
        self.slides, self.how = slides, (panel, run, out, rules)

    def __call__(self, batch: pa.Table) -> Iterable[pa.Table]:
        for slide_id in batch["slide_id"].to_pylist():
            try:
                result = make_bags(self.slides[slide_id], *self.how)
            except ValueError as error:
                result = {"slide_id": slide_id, "error": str(error)}
            except OSError as error:  # the message of some is only the path
                result = {"slide_id": slide_id, "error": f"{type(error).__name__}: {error}"}
            yield pa.Table.from_pylist([result], schema=RESULT)


def build_bags(
    slides: Sequence[TrainingSlide],
    panel: Sequence[str],
    run: RunFolder,
    out: str,
    workers: int,
    rules: Rules = DEFAULT_RULES,
) -> dict[str, dict[str, Any]]:
    """Write the BAGS of all slides, in parallel; return `RESULT` rows by slide_id.

    Raises:
        ValueError: spots of a slide cannot be used, for example because no spot has a cell. The
            message lists all such slides. To train on the other slides, leave those out.
    """
    hide_progress_bars()
    by_id = {slide.row.slide_id: slide for slide in slides}
    names = [pa.table({"slide_id": [slide.row.slide_id]}) for slide in slides]
    results = dataset_of(names).map_batches(
        _Bags,
        fn_constructor_kwargs={
            "slides": by_id,
            "panel": list(panel),
            "run": run,
            "out": out,
            "rules": rules,
        },
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ActorPoolStrategy(size=min(workers, len(slides))),
    )
    rows = {row["slide_id"]: row for row in results.take_all()}
    errors = [f"{slide_id}: {row['error']}" for slide_id, row in rows.items() if row["error"]]
    if errors:
        message = "cannot train: " + "; ".join(sorted(errors))
        raise ValueError(message)
    return rows
