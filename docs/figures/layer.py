"""Draw docs/figures/layer.svg: tokens of two modalities, the router's masks, expert groups, shared experts.

python docs/figures/layer.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

TEXT, AUDIO, SHARED, LINE, INK = "#2f6fb3", "#c8641e", "#5a7d4f", "#8a8f98", "#1f2328"
WIDTH, HEIGHT = 708, 320
SIZE, GAP = 44, 12
TOKENS = (("the", TEXT, 1), ("cat", TEXT, 2), ("♪", AUDIO, 5), ("♪", AUDIO, 7), ("sat", TEXT, 0), ("♪", AUDIO, 6))
"""Label, modality and the expert that the token is sent to."""


def box(x: float, y: float, width: float, height: float, color: str, label: str, filled: bool = True) -> str:
    style = f'fill="{color}"' if filled else f'fill="white" stroke="{color}" stroke-width="1.5"'
    ink = "white" if filled else color
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" {style}/>'
        f'<text x="{x + width / 2:g}" y="{y + height / 2 + 5:g}" fill="{ink}" text-anchor="middle">{label}</text>'
    )


def curve(x0: float, y0: float, x1: float, y1: float, color: str, opacity: float = 0.75) -> str:
    middle = (y0 + y1) / 2
    path = f"M{x0:g},{y0:g} C{x0:g},{middle:g} {x1:g},{middle:g} {x1:g},{y1:g}"
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2" opacity="{opacity}"/>'


def note(x: float, y: float, text: str, color: str = INK, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{color}" text-anchor="{anchor}" font-size="13">{text}</text>'


def drawing() -> Iterator[str]:
    left, token_y, router_y, expert_y = 40, 24, 108, 192
    expert_x = [left + index * (SIZE + GAP) + (28 if index > 3 else 0) for index in range(8)]
    shared_x = expert_x[-1] + SIZE + 60
    token_x = [left + 48 + index * (SIZE + 22) for index in range(len(TOKENS))]
    right = expert_x[-1] + SIZE
    for x, (_, color, expert) in zip(token_x, TOKENS, strict=True):
        yield curve(x + SIZE / 2, token_y + 34, x + SIZE / 2, router_y, color)
        yield curve(x + SIZE / 2, router_y + 40, expert_x[expert] + SIZE / 2, expert_y, color)
        yield curve(x + SIZE / 2, token_y + 34, shared_x + 52, expert_y, SHARED, 0.35)
    for x, (label, color, _) in zip(token_x, TOKENS, strict=True):
        yield box(x, token_y, SIZE, 34, color, label)
    yield box(left, router_y, right - left, 40, INK, "router: other modalities' experts are masked before top-k", False)
    for index, x in enumerate(expert_x):
        yield box(x, expert_y, SIZE, SIZE, TEXT if index < 4 else AUDIO, f"E{index}", index in {e for *_, e in TOKENS})
    yield box(shared_x, expert_y, 104, SIZE, SHARED, "shared")
    yield note((expert_x[0] + expert_x[3] + SIZE) / 2, expert_y + 66, "text experts", TEXT, "middle")
    yield note((expert_x[4] + expert_x[7] + SIZE) / 2, expert_y + 66, "audio experts", AUDIO, "middle")
    yield note(shared_x + 52, expert_y + 66, "see every token", SHARED, "middle")
    yield f'<path d="M{left},{expert_y + 84} H{shared_x + 104}" stroke="{LINE}"/>'
    yield note(left, expert_y + 108, "output of a token = gates x its experts + shared experts")


def main() -> None:
    body = "\n".join(drawing())
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        ' font-family="Helvetica, Arial, sans-serif" font-size="15" role="img"'
        ' aria-label="The modality-aware mixture-of-experts layer">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )
    (Path(__file__).parent / "layer.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
