"""Types of the JSON documents of a run folder, key by key as FORMAT.md names them.

A record states the outcome of one slide. It is the only proof that the slide's tables exist.
"""

from typing import Literal, NotRequired, TypedDict

from scellst_ray.runs.identity import StoredIdentity
from scellst_ray.storage import StoredStamp

SlideStatus = Literal["done", "empty", "partial", "failed"]
CropStatus = Literal["done", "empty", "failed"]


class SeamCounts(TypedDict):
    """Counts of the nuclei that lay at a seam, the border between two tiles.

    Attributes:
        doubled: Nuclei found by two tiles and kept once.
        adopted: Nuclei owned by no tile and kept.
    """

    doubled: int
    adopted: int


class DomainShift(TypedDict):
    """Distance of a slide's cells from the cells that the head was trained on.

    Attributes:
        score: Root of the mean over cells of `distance` squared.
        limit: Highest score of a held-out training slide; None if the head does not know it.
        beyond: Whether the score is above the limit; None without a limit.
    """

    score: float
    limit: float | None
    beyond: bool | None


class ImportReport(TypedDict, total=False):
    """Counts of the objects of a file of imported nuclei.

    Attributes:
        source: Name of the file in messages.
        format: Format that the file was read as.
        num_objects: Number of objects that could be nuclei.
        dropped: Number of objects left out, by reason.
        changed: Number of objects kept in another shape, by reason.
        lonlat: Whether the file says that its coordinates are longitude and latitude.
        fingerprint: Fingerprint of the file; absent from earlier releases.
    """

    source: str
    format: str
    num_objects: int
    dropped: dict[str, int]
    changed: dict[str, int]
    lonlat: bool
    fingerprint: NotRequired[str]


class SlideRecord(TypedDict):
    """Content of `records/<slide_id>.json`.

    Attributes:
        slide_id: The slide.
        status: Outcome of the slide.
        num_cells: Number of nuclei kept.
        num_tiles: Number of tiles of the slide.
        num_failed_tiles: Number of tiles that failed.
        mpp: um per level-0 px; None if the slide could not be opened.
        read_mpp: um per px at which tiles were read; None if the slide could not be opened.
        width0: Width in level-0 px; None if the slide could not be opened.
        height0: Height in level-0 px; None if the slide could not be opened.
        seconds: Worker seconds by stage.
        waited_s: Seconds that tiles lay between processes; absent from earlier releases.
        scellst_ray: Release that wrote the record.
        finished: UTC time, ISO 8601.
        stage: Stage at which the first failed tile failed.
        error_type: Class of its exception.
        error: Message of its exception.
        tables: Names of the tables that exist; absent if the slide failed.
        seams: Nuclei at borders between tiles; absent if the slide failed.
        domain_shift: `predict` only; absent without cells and from earlier releases.
        imported: Counts of imported nuclei; absent if nuclei were not imported.
        source: What the slide was read from, see FORMAT.md; absent if the slide was never opened
            and from earlier releases.
        num_crops: Number of crops. A driver adds it after cutting crops; it is never stored.
        damaged_shards: Shards whose tiles must be done again before the slide can be finished; it
            is never stored.
        files: Stamp of each table's file, by name of the table; absent from earlier releases.
    """

    slide_id: str
    status: SlideStatus
    num_cells: int
    num_tiles: int
    num_failed_tiles: int
    mpp: NotRequired[float | None]
    read_mpp: NotRequired[float | None]
    width0: NotRequired[int | None]
    height0: NotRequired[int | None]
    seconds: NotRequired[dict[str, float]]
    waited_s: NotRequired[float]
    scellst_ray: NotRequired[str]
    finished: NotRequired[str]
    stage: NotRequired[str | None]
    error_type: NotRequired[str | None]
    error: NotRequired[str | None]
    tables: NotRequired[list[str]]
    seams: NotRequired[SeamCounts]
    domain_shift: NotRequired[DomainShift]
    imported: NotRequired[ImportReport]
    source: NotRequired[str]
    num_crops: NotRequired[int]
    damaged_shards: NotRequired[list[str]]
    files: NotRequired[dict[str, StoredStamp]]


class ColourTotals(TypedDict):
    """Totals over the pixels of crops, from which mean and deviation of colours follow.

    Attributes:
        num_px: Number of pixels.
        sums: Sum of the values 0-255 of each channel.
        squares: Sum of their squares.
    """

    num_px: int
    sums: list[int]
    squares: list[int]


class CropRecord(TypedDict):
    """Content of `crops/<set>/records/<slide_id>.json`.

    Attributes:
        slide_id: The slide.
        status: Outcome of cutting its crops.
        num_crops: Number of crops.
        cutoff: Highest priority of a cell in the sample.
        scellst_ray: Release that wrote the record.
        finished: UTC time, ISO 8601.
        num_types: Number of crops by nucleus type.
        num_bytes: Bytes of all images.
        digest: SHA-256 of ids and images in their order.
        centre: Totals over the pixels that encoders see.
        seconds: Seconds that the slide took.
        error_type: Class of the exception, if crops could not be cut.
        error: Message of the exception.
        file: Stamp of the file of crops; absent from earlier releases.
    """

    slide_id: str
    status: CropStatus
    num_crops: int
    cutoff: int
    scellst_ray: str
    finished: str
    num_types: NotRequired[dict[str, int]]
    num_bytes: NotRequired[int]
    digest: NotRequired[str]
    centre: NotRequired[ColourTotals]
    seconds: NotRequired[float]
    error_type: NotRequired[str]
    error: NotRequired[str]
    file: NotRequired[StoredStamp]


class SlideCrops(TypedDict):
    """Crops of one slide in `crops.json`; keys as in `CropRecord`."""

    num_crops: int
    num_types: dict[str, int]
    num_bytes: int
    digest: str
    centre: ColourTotals
    file: NotRequired[StoredStamp]


class SampleSettings(TypedDict):
    """Settings of a sample of cells; keys as in `CropSample`."""

    total: int
    per_slide: int | None
    per_type: int | None
    seed: int


class CropCutoff(TypedDict):
    """Content of `crops/<set>/set.json` that is read again.

    Attributes:
        cutoff: Highest priority of a cell in the sample.
    """

    cutoff: int


class CropIndex(TypedDict):
    """Content of `crops/crops.json`.

    Attributes:
        format_version: Format version.
        run_digest: Digest of the run that has the cells.
        set: Name of the folder of this set of crops.
        sample: Settings of the sample of cells.
        crop_um: Side of a stored crop, um.
        crop_px: Side of a stored crop, px.
        codec: Coding of the images.
        row_group: Number of rows of each row group but the last.
        num_crops: Number of crops of all slides.
        slides: Slides that have crops, by slide_id.
        failed: Reason why a slide has no crops, by slide_id.
    """

    format_version: int
    run_digest: str
    set: str
    sample: SampleSettings
    crop_um: float
    crop_px: int
    codec: str
    row_group: int
    num_crops: int
    slides: dict[str, SlideCrops]
    failed: dict[str, str]


class SlideSource(TypedDict):
    """One slide in `slides.json`: what decides its result next to the settings of the run.

    Attributes:
        uri: File of the slide.
        mpp: um per level-0 px that the manifest gives; None: the file's own.
        bytes: Size of the file; None: not known.
        segmentation: File of imported nuclei.
        segmentation_bytes: Size of that file; None: not known.
        colours: Mean and deviation of RGB, with `colours_from`; None for a slide without crops.
        named: Path of the file from the manifest's folder; absent if it is not below it.
        segmentation_named: The same of the file of imported nuclei.
        changed: True if the slide was another one in an earlier command and was not finished.
    """

    uri: str
    mpp: float | None
    bytes: NotRequired[int | None]
    segmentation: NotRequired[str]
    segmentation_bytes: NotRequired[int | None]
    colours: NotRequired[list[list[float]] | None]
    named: NotRequired[str]
    segmentation_named: NotRequired[str]
    changed: NotRequired[bool]


class RunInfo(TypedDict):
    """Content of `run.json`.

    Attributes:
        digest: Digest of the identity.
        identity: Everything that changes results.
        created: UTC time at which the run began, ISO 8601.
        format_version: Format version.
        libraries: Major and minor versions of the libraries that decide pixels, by name; absent
            from earlier releases.
    """

    digest: str
    identity: StoredIdentity
    created: NotRequired[str]
    format_version: int
    libraries: NotRequired[dict[str, str]]


class LeaseInfo(TypedDict):
    """Content of `lease.json`; times are UTC, ISO 8601.

    Attributes:
        token: Random name of this lease.
        host: Name of the holder's host.
        machine: Name that processes with common pids and a common clock share.
        pid: Number of the holder's process.
        process: Start time of the process, which a later one of the same number does not share.
        acquired: Time at which the holder took the lease.
        renewed: Time at which the holder last renewed it.
        expires: Time at which the lease ends if it is not renewed.
        seconds: Duration of the lease if it is not renewed.
    """

    token: str
    host: str
    machine: str
    pid: int
    process: str | None
    acquired: str
    renewed: str
    expires: str
    seconds: float


def known_mpp(record: SlideRecord, name: Literal["mpp", "read_mpp"] = "mpp") -> float:
    """Return a resolution of a slide that was opened, um per px.

    Raises:
        ValueError: the record has none.
    """
    value = record.get(name)
    if value is None:
        raise ValueError(_explain_unknown(record, name))
    return float(value)


def known_size0(record: SlideRecord) -> tuple[int, int]:
    """Return width and height of a slide that was opened, level-0 px.

    Raises:
        ValueError: the record has none.
    """
    width0, height0 = record.get("width0"), record.get("height0")
    if width0 is None or height0 is None:
        raise ValueError(_explain_unknown(record, "width0 and height0"))
    return width0, height0


def _explain_unknown(record: SlideRecord, names: str) -> str:
    return (
        f"slide {record['slide_id']!r}: its record does not know {names}, so the slide was never "
        "opened; fix its file and run the same command again"
    )
