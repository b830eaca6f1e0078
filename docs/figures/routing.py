"""Draw docs/figures/routing.svg: the routing maps of a run's report, one below the other.

python docs/figures/routing.py runs/quickstart
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_most.report.routing import routing_view
from megatron_most.report.routing_map import RoutingMap
from megatron_most.report.run_files import read_run

COLORS = ("#2f6fb3", "#c8641e")
INK, LINE, CLOSED = "#1f2328", "#8a8f98", "#eef0f2"
TITLE, MARGIN = 28, 10


def label(x: float, y: float, text: str, anchor: str = "middle", color: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{color}" text-anchor="{anchor}" font-size="12">{text}</text>'


def drawn(chart: RoutingMap, color: str) -> Iterator[str]:
    """One modality's map, in its own coordinates."""
    yield f'<text x="0" y="-10" fill="{color}" font-size="14" font-weight="bold">{chart.modality} tokens</text>'
    for text, x in chart.heads:
        yield label(x, chart.top - 8, text, color=LINE)
    for cell in chart.cells:
        is_used = cell.kind in ("used", "leak")
        fill = f'fill="{color}" fill-opacity="{max(0.06, cell.strength):g}"' if is_used else f'fill="{CLOSED}"'
        size = f'width="{cell.width:g}" height="{cell.height:g}"'
        yield f'<rect x="{cell.x:g}" y="{cell.y:g}" {size} stroke="white" {fill}/>'
        if is_used and chart.show_values:
            ink = "white" if cell.strength > 0.6 else INK
            yield label(cell.x + cell.width / 2, cell.y + cell.height / 2 + 4, f"{cell.share:.0%}", color=ink)
    for text, y in chart.rows:
        yield label(chart.cells[0].x - 8, y + 4, text, "end")
    for x in chart.borders:
        yield f'<path d="M{x:g},{chart.top:g} V{chart.bottom:g}" stroke="{INK}"/>'
    for text, x in chart.columns:
        yield label(x, chart.bottom + 15, text, color=LINE)
    for head, right, values in chart.numbers:
        yield label(right, chart.top - 8, head, "end", LINE)
        for (_, y), value in zip(chart.rows, values, strict=True):
            yield label(right, y + 4, value, "end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="run directory with routing.jsonl")
    view = routing_view(read_run(parser.parse_args().run_dir))
    assert view is not None, "the run has no routing.jsonl"
    y, parts = 0.0, []
    for chart, color in zip(view.maps, COLORS, strict=True):
        y += TITLE
        body = "\n".join(drawn(chart, color))
        parts.append(f'<g transform="translate({MARGIN},{y:g})">\n{body}\n</g>')
        y += chart.height
    width, height = max(chart.width for chart in view.maps) + 2 * MARGIN, y + MARGIN
    what = " ".join(chart.description + "." for chart in view.maps)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
        f' height="{height:g}" font-family="Helvetica, Arial, sans-serif" role="img" aria-label="{what}">\n'
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
    (Path(__file__).parent / "routing.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
