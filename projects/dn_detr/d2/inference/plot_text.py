"""Texts of users in matplotlib: class names in any script, taken literally."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cache

import matplotlib
from matplotlib.font_manager import (
    FontEntry,
    FontProperties,
    findfont,
    fontManager,
    get_font,
    weight_dict,
)
from matplotlib.ft2font import FT2Font

logger = logging.getLogger(__name__)

_DEFAULT = ""
_FONT_OF: dict[str, str | None] = {}
"""Character -> family that has it: _DEFAULT, an installed one, or None."""

_TOLD: list[str] = []


def literal_text(texts: Iterable[str]) -> AbstractContextManager:
    """Return a context in which matplotlib draws texts as they are, `$` included.

    Figures are made and rendered within it.

    Args:
        texts: what is drawn; it chooses the fonts.
    """
    return matplotlib.rc_context({"text.parse_math": False, "font.family": families(texts)})


def families(texts: Iterable[str]) -> list[str]:
    """Return the font families that texts need, matplotlib's own first."""
    fonts = _fonts_of("".join(texts))
    return [*matplotlib.rcParams["font.family"], *sorted({font for font in fonts if font})]


def class_label(name: str, number: int) -> str:
    """Return what is drawn for a class: its name, or "class 3" if no font has its letters.

    The first such class of a process is logged.
    """
    if None not in _fonts_of(name):
        return name
    if not _TOLD:
        _TOLD.append(name)
        logger.warning(
            f"no installed font has the letters of {name!r}: such classes are drawn as numbers, "
            f"this one as 'class {number}'; install a font, for example Noto Sans CJK (Debian's "
            "fonts-noto-cjk)."
        )
    return f"class {number}"


def _fonts_of(text: str) -> set[str | None]:
    """Return the families that the characters of a text need."""
    characters = {c for c in text if c.isprintable() and not c.isspace()}
    missing = {c for c in characters if c not in _FONT_OF}
    for source in (_default_font, _installed_fonts):
        while missing:  # the font that has most of them
            has = {name: _characters(font, missing) for name, font in source().items()}
            name = max(has, key=lambda name: len(has[name]))
            if not has[name]:
                break
            _FONT_OF.update(dict.fromkeys(has[name], name))
            missing -= has[name]
    _FONT_OF.update(dict.fromkeys(missing))
    return {_FONT_OF[c] for c in characters}


def _characters(font: FT2Font, characters: set[str]) -> set[str]:
    return {c for c in characters if font.get_char_index(ord(c))}


def _default_font() -> dict[str, FT2Font]:
    return {_DEFAULT: get_font(findfont(FontProperties()))}


@cache
def _installed_fonts() -> dict[str, FT2Font]:
    """Open the most regular font of every family, regular ones first."""

    def irregularity(entry: FontEntry) -> tuple:
        weight = weight_dict.get(entry.weight, entry.weight)
        return entry.style != "normal", abs(weight - 400), "Sans" not in entry.name, entry.name

    paths: dict[str, str] = {}
    for entry in sorted(fontManager.ttflist, key=irregularity):
        if "Last Resort" not in entry.name:  # matplotlib's font of labelled boxes
            paths.setdefault(entry.name, entry.fname)
    return {name: FT2Font(path) for name, path in paths.items()}
