"""Two runs of the same slides, as two segmenters may give them."""

from scellst_ray import storage
from scellst_ray.runs.folder import begin_run
from scellst_ray.runs.reading import open_run
from tests.support.exported_runs import GENES, add_slide
from tests.support.run_folders import Settings, record
from tests.support.stored_heads import write_head


def make_other_run(folder, slides, *, genes=GENES, failed=()):
    """Return a run of predict with other cells of slides.

    Args:
        folder: Folder of its own.
        slides: Number of cells by slide_id.
        genes: The panel; None: a run of extract.
        failed: Slides that failed.
    """
    uri = str(folder / "other")
    head = genes is not None
    identity = {"store_embeddings": not head, "segmenter": "other"}
    run = begin_run(uri, "predict" if head else "extract", Settings(identity), {})
    if head:
        write_head(f"{uri}/head.safetensors", genes)
    for slide_id, count in slides.items():
        add_slide(run, slide_id, count, embedding=not head, hidden=head)
    for slide_id in failed:
        text = {"stage": "plan", "error_type": "ValueError", "error": "cut off"}
        found = record(slide_id, "failed", num_tiles=0, **text)
        storage.publish_json(run.record_uri(slide_id), found)
    return open_run(uri)
