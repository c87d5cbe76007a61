"""Pages: views put into the templates. Whatever a view holds is text there, never markup."""

from functools import cache
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from scellst_ray.report.pictures import value_colours
from scellst_ray.report.views import CohortView, SlideView

INDEX = "index.html"
FOLDER = "slides"


@cache
def _environment() -> Environment:
    loader = PackageLoader("scellst_ray.report")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stops = value_colours()[:: len(value_colours()) // 8]
    environment.globals["gradient"] = ", ".join(f"rgb({r} {g} {b})" for r, g, b in stops)
    return environment


def page_name(slide_id: str) -> str:
    """Return the name of a slide's page, from the folder of the report."""
    return f"{FOLDER}/{slide_id}.html"


def page_link(slide_id: str) -> str:
    """Return the link to a slide's page, from that of the cohort."""
    return quote(page_name(slide_id))


def render_slide(view: SlideView, run_name: str) -> str:
    """Return the page of a slide."""
    return _environment().get_template("slide.html").render(view=view, run_name=run_name)


def render_cohort(view: CohortView) -> str:
    """Return the page of a cohort."""
    return _environment().get_template("cohort.html").render(view=view)
