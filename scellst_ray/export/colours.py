"""Colours of nucleus types in pictures and exports."""

from collections.abc import Iterable

# Colours of PanNuke's classes in the figures of its paper. Other types take the next spare colour.
COLOURS = {
    "neoplastic": "#ff0000",
    "inflammatory": "#22dd4d",
    "connective": "#235cec",
    "dead": "#feff00",
    "epithelial": "#ff9f44",
}
SPARE_COLOURS = (
    *("#1f77b4", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f"),
    *("#393b79", "#637939", "#843c39", "#9edae5", "#f7b6d2", "#dbdb8d"),
)


def colours_of(types: Iterable[str]) -> dict[str, str]:
    """Return a colour '#rrggbb' for each nucleus type, in the order of the types."""
    names = list(types)
    others = [name for name in names if name.lower() not in COLOURS]
    spare = {name: SPARE_COLOURS[i % len(SPARE_COLOURS)] for i, name in enumerate(others)}
    return {name: COLOURS.get(name.lower()) or spare[name] for name in names}


def rgb_of(colour: str) -> list[int]:
    """Return the red, green and blue, 0-255, of a colour '#rrggbb'."""
    return list(bytes.fromhex(colour[1:]))
