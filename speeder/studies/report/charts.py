"""Charts of the report: each drawn wide and narrow as SVG inside the page, and as files for other documents.

In the page, text stays text, and colours are the page's own, so charts are readable in dark mode too.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from speeder.studies.charts import saved_figure

NARROW = 4.3  # inches; at this width letters are of about the page's size on a phone

# Colours of `speeder.studies.charts` -> the page's variables, which differ in dark mode
_COLOURS = {
    "#000000": "--ink",
    "#262626": "--ink",
    "#444444": "--soft",
    "#e3e3e3": "--line",
    "#f1f4f8": "--shade",
    "#ffffff": "--card",
    "#9aa3ad": "--soft",
    "#fefefe": "--on-deep",
    "#010101": "--on-light",
    "#0072b2": "--c0",
    "#d55e00": "--c1",
    "#009e73": "--c2",
    "#cc79a7": "--c3",
    "#e69f00": "--c4",
    "#56b4e9": "--c5",
}
_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>", re.DOTALL)
_PAINT = re.compile(r"((?:fill|stroke): )(#[0-9a-f]{6})")
_REFERENCE = re.compile(r'(\bid="|url\(#|href="#)')


@dataclass(frozen=True)
class Chart:
    """One drawing.

    Attributes:
        name: the name of its files, and the prefix of its ids in the page.
        title: a few words.
        description: sentences with its figures, for screen readers.
        draw: draws on a figure of any width.
        size, narrow_height: inches: of the wide drawing, and the height of the narrow one.
    """

    name: str
    title: str
    description: str
    draw: Callable[[Figure], None]
    size: tuple[float, float]
    narrow_height: float

    def svg(self, narrow: bool = False) -> Markup:
        """The drawing as an element of the page."""
        width, height = (NARROW, self.narrow_height) if narrow else self.size
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "chart.svg"
            with saved_figure(path, width, height) as figure:
                self.draw(figure)
            text = path.read_text(encoding="utf-8")
        return _element(text, f"{self.name}-{'narrow' if narrow else 'wide'}-", self.description)

    def save(self, folder: Path) -> list[Path]:
        """Write the wide drawing as PNG and as SVG, atomically."""
        paths = [folder / f"{self.name}{ending}" for ending in (".png", ".svg")]
        for path in paths:
            with saved_figure(path, *self.size) as figure:
                self.draw(figure)
        return paths


def save_all(charts: Iterable[Chart], folder: Path) -> list[Path]:
    """Write every chart's files."""
    return [path for chart in charts for path in chart.save(folder)]


def _element(svg: str, prefix: str, description: str) -> Markup:
    """An SVG document as an element of a page with others: unique ids, the page's colours, no style."""
    text = _METADATA.sub("", _HEAD.sub("", svg, count=1))
    text = _REFERENCE.sub(rf"\g<1>{prefix}", text)
    text = _PAINT.sub(_page_colour, text)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    label = f'<svg role="img" aria-label="{escape(description)}" '
    return Markup(text.replace("<svg ", label, 1).strip())


def _page_colour(found: re.Match) -> str:
    variable = _COLOURS.get(found[2])
    return f"{found[1]}var({variable})" if variable else found[0]
