"""Receipts and the files they are of: receipts of another file never count."""

import pyarrow as pa
import pyarrow.compute as pc

SOURCE = "source"


def of_source(receipts: pa.Table, source: str | None, *, trusted: bool) -> pa.Table:
    """Return the receipts of a slide that are of its file as it is now.

    Args:
        receipts: RECEIPTS of one slide.
        source: The slide's present source; None: its file cannot be found, so none count.
        trusted: Whether receipts without a source, which earlier releases wrote, may count. They
            then get the present source, but only if no receipt is of another one.
    """
    if source is None:
        return receipts.slice(0, 0)
    is_same = pc.fill_null(pc.equal(receipts[SOURCE], source), False)  # noqa: FBT003
    num_unknown = receipts[SOURCE].null_count
    if trusted and num_unknown and num_unknown + pc.sum(is_same).as_py() == len(receipts):
        return with_source(receipts, source)
    return receipts.filter(is_same)


def with_source(receipts: pa.Table, source: str) -> pa.Table:
    """Return receipts with this source."""
    at = receipts.schema.get_field_index(SOURCE)
    values = pa.repeat(pa.scalar(source, pa.string()), len(receipts))
    return receipts.set_column(at, receipts.schema.field(at), values)


def only_source(slide_id: str, receipts: pa.Table) -> str | None:
    """Return the source of the receipts of one slide.

    Raises:
        ValueError: the receipts are of several sources.
    """
    sources = receipts[SOURCE].unique().to_pylist()
    if len(sources) > 1:
        message = (
            f"slide {slide_id!r}: its tiles are of {len(sources)} files; run the same command "
            "again, which does the slide from the start"
        )
        raise ValueError(message)
    source: str | None = sources[0] if sources else None
    return source
