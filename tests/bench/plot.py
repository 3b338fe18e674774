"""A bar chart as an SVG, by the standard library alone, readable on a light and on a dark page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH, LABEL, ROW, BAR, TOP = 720, 220, 30, 20, 56
# Grey text, which stands out from white and from black, for viewers that know nothing of the page's colours.
STYLE = """
text { font: 14px -apple-system, "Segoe UI", "Noto Sans", "PingFang SC", sans-serif; fill: #6e7781; }
.title { font-weight: 600; }
.bar { fill: #8c959f; }
.own { fill: #2f81f7; }
@media (prefers-color-scheme: light) { text { fill: #1f2328; } }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } }
"""


class Bar(NamedTuple):
    """One bar: its name, its length, and whether it is the one that the chart is about."""

    name: str
    value: float
    own: bool = False


def draw(titles: Sequence[str], bars: Sequence[Bar]) -> str:
    """The SVG: the titles above one another, and the bars under them, with their values behind them."""
    longest = max(bar.value for bar in bars)
    height = TOP + ROW * len(bars)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
             f"<title>{escape(titles[0])}</title>", f"<style>{STYLE}</style>"]
    lines += [f'<text class="title" x="8" y="{20 + 20 * number}">{escape(title)}</text>'
              for number, title in enumerate(titles)]
    for number, bar in enumerate(bars):
        middle = TOP + ROW * number + ROW / 2
        length = max(1.0, bar.value / longest * (WIDTH - LABEL - 80))
        lines += [f'<text x="{LABEL - 10}" y="{middle + 5:g}" text-anchor="end">{escape(bar.name)}</text>',
                  f'<rect class="bar{" own" * bar.own}" x="{LABEL}" y="{middle - BAR / 2:g}" width="{length:.1f}" '
                  f'height="{BAR}" rx="3"/>',
                  f'<text x="{LABEL + length + 8:.1f}" y="{middle + 5:g}">{bar.value:,.0f}</text>']
    return "\n".join([*lines, "</svg>"]) + "\n"


def write(path: Path, titles: Sequence[str], bars: Sequence[Bar]) -> None:
    """Draw into a file."""
    path.write_text(draw(titles, bars), encoding="utf-8")
