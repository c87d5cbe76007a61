"""What the templates of a report show, as plain values."""

from dataclasses import dataclass, field

from scellst_ray.report.compared import SlideBeside
from scellst_ray.report.distributions import Distributions
from scellst_ray.report.pictures import Picture


@dataclass(frozen=True)
class Scale:
    """The scale of a map's colours.

    Attributes:
        low: Value of the first colour, as text.
        high: Value of the last colour, as text.
        unit: Unit of both.
    """

    low: str
    high: str
    unit: str


@dataclass(frozen=True)
class Map:
    """A picture with what must be said of it.

    Attributes:
        picture: The picture.
        title: What it shows, in a few words.
        scale: Scale of its colours; None if they are no values.
        bar: Share of the width that a scale bar takes, in percent, and its text; None without one.
        window: Left, top, width and height of a square to mark, in percent; None without one.
    """

    picture: Picture
    title: str
    scale: Scale | None = None
    bar: tuple[float, str] | None = None
    window: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Row:
    """A name with maps and words.

    Attributes:
        name: The gene, or what else is shown.
        maps: Its maps.
        about: What is said of it; empty: nothing.
    """

    name: str
    maps: list[Map]
    about: str = ""


@dataclass(frozen=True)
class Table:
    """A table of text; numbers are right-aligned.

    Attributes:
        headings: Headings of the columns.
        rows: Cells as text.
        about: What is said of it.
    """

    headings: list[str]
    rows: list[list[str]]
    about: str = ""


@dataclass(frozen=True)
class Ridge:
    """How a gene is distributed over the cells of a type.

    Attributes:
        name: The type.
        colour: Its colour, '#rrggbb'.
        points: Outline of the distribution, as points of an SVG polygon.
        mark: Where the median lies, px from the left.
        median: The median as text.
        about: All of it in words.
    """

    name: str
    colour: str
    points: str
    mark: float
    median: str
    about: str


@dataclass(frozen=True)
class Ridges:
    """How a gene is distributed over the cells of each type, from its lowest to its highest value.

    Attributes:
        gene: The gene.
        low: Lowest value of all types, as text.
        high: Highest value of all types, as text.
        ridges: One for each type.
    """

    gene: str
    low: str
    high: str
    ridges: list[Ridge]


@dataclass(frozen=True)
class Swatch:
    """A type in the legend.

    Attributes:
        name: The type.
        colour: Its colour, '#rrggbb'.
        count: Number of cells.
        share: Share of the slide's cells, in percent.
    """

    name: str
    colour: str
    count: int
    share: float


@dataclass(frozen=True)
class ScoredView:
    """Cell types from expression on a slide.

    Attributes:
        types: The best types of its cells.
        overview: Map of them.
        scores: Maps of the scores.
        agreement: Cells by nucleus type and best type.
        ridges: Distributions of the genes by best type.
        not_shown: Types that have no map, as they are best in few cells.
        about: How cells were scored, in words.
    """

    types: list[Swatch]
    overview: Row
    scores: Row
    agreement: Table
    ridges: list[Ridges]
    not_shown: list[str]
    about: str


@dataclass(frozen=True)
class BesideView:
    """Two runs side by side.

    Attributes:
        name: Name of the other run's folder.
        notes: What only one of both has, and why something cannot be compared.
        tables: What both say.
        maps: Each gene in both.
    """

    name: str
    notes: list[str]
    tables: list[Table] = field(default_factory=list)
    maps: list[Row] = field(default_factory=list)


@dataclass
class SlideView:
    """All that the page of a slide shows.

    Attributes:
        slide_id: The slide.
        facts: Names and values for the head of the page.
        shift: Domain shift in words; empty: nothing is known of it.
        is_beyond: Whether the slide lies beyond the limit of domain shift.
        overview: The slide and the map of its types.
        types: The nucleus types.
        genes: Maps of genes.
        unit: Unit of expression, in words.
        by_type: Mean expression by type; None without genes.
        ridges: Distributions of the genes by type.
        scored: Cell types from expression; None without scores.
        pairs: Number of cells by nucleus type and best type.
        beside: Another run of the slide; None without one.
        compared: What both runs say; None if that is not known.
        spots: Spots measured and predicted.
        galleries: Rows of crops.
        accuracy: Tables of an evaluation.
        notes: What the page lacks, and why.
        problems: What could not be read.
        tiny: The slide for the page of the cohort; None without a thumbnail.
        small: The slide, to be shown next to each gene; None without a thumbnail.
        means: Mean expression of each shown gene.
        distributions: Distributions of these genes; None without them.
        versions: What made the results.
    """

    slide_id: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    shift: str = ""
    is_beyond: bool = False
    overview: list[Map] = field(default_factory=list)
    types: list[Swatch] = field(default_factory=list)
    genes: list[Row] = field(default_factory=list)
    unit: str = ""
    by_type: Table | None = None
    ridges: list[Ridges] = field(default_factory=list)
    scored: ScoredView | None = None
    pairs: dict[tuple[str, str], int] = field(default_factory=dict)
    beside: BesideView | None = None
    compared: SlideBeside | None = None
    spots: list[Row] = field(default_factory=list)
    galleries: list[Row] = field(default_factory=list)
    accuracy: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tiny: Picture | None = None
    small: Picture | None = None
    means: dict[str, float] = field(default_factory=dict)
    distributions: Distributions | None = None
    versions: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class SlideLine:
    """A slide on the page of the cohort.

    Attributes:
        slide_id: The slide.
        status: Status of its record, or 'pending'.
        href: Its page, relative to that of the cohort; empty without one.
        num_cells: Number of cells.
        shift: Score of domain shift as text; '-' where it is not known.
        is_beyond: Whether that is beyond the limit.
        tiny: The slide; None without a thumbnail.
        types: The nucleus types.
        means: Mean expression of each shown gene, as text, and how dark to show it, 0 to 1.
        problems: What could not be read.
    """

    slide_id: str
    status: str
    href: str
    num_cells: int
    shift: str
    is_beyond: bool
    tiny: Picture | None
    types: list[Swatch]
    means: list[tuple[str, float]]
    problems: list[str]


@dataclass(frozen=True)
class CohortView:
    """All that the page of the cohort shows.

    Attributes:
        name: Name of the run folder.
        facts: Names and values for the head of the page.
        genes: The shown genes.
        how_chosen: How the genes were chosen.
        unit: Unit of expression, in words.
        lines: The slides.
        empty: Slides without cells, each with the reason.
        failed: Slides that failed, and tiles of partial ones, each with the reason.
        shifts: Sentences on domain shift.
        accuracy: Tables of an evaluation.
        notes: What the page lacks, and why.
        versions: What made the results.
        ridges: Distributions of the genes by type, over all slides.
        scored: How cells were scored for types, in words; empty without scores.
        agreement: Cells by nucleus type and best type; None without scores.
        beside: Another run of the slides; None without one.
        differential: Top genes of each nucleus type; None without them.
    """

    name: str
    facts: list[tuple[str, str]]
    genes: list[str]
    how_chosen: str
    unit: str
    lines: list[SlideLine]
    empty: list[tuple[str, str]]
    failed: list[tuple[str, str]]
    shifts: list[str]
    accuracy: list[Table]
    notes: list[str]
    versions: list[tuple[str, str]]
    ridges: list[Ridges]
    scored: str = ""
    agreement: Table | None = None
    beside: BesideView | None = None
    differential: Table | None = None
