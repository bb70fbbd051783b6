"""Static pictures for a model card, as SVG: how training went, and how often features fire."""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 15, 35, 45  # margins
TICKS = 5
STYLE = 'font-family="sans-serif" font-size="12" fill="#333"'


def line(title: str, x_label: str, x: Sequence[float], y: Sequence[float], bars: bool = False) -> str:
    """An SVG of a line through points, or of bars up to them, with ticks on both axes; ``x`` rises, both are finite."""
    low_x, high_x = x[0], x[-1] if x[-1] > x[0] else x[0] + 1
    low_y, high_y = 0.0, max(y) or 1.0

    def at(a: float, b: float) -> tuple[float, float]:
        across = (a - low_x) / (high_x - low_x)
        up = (b - low_y) / (high_y - low_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" {STYLE} font-weight="bold">{escape(title)}</text>',
        f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 8}" {STYLE} text-anchor="middle">{escape(x_label)}</text>',
    ]
    for i in range(TICKS + 1):
        a, b = low_x + (high_x - low_x) * i / TICKS, high_y * i / TICKS
        across, up = at(a, low_y)[0], at(low_x, b)[1]
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up:.1f}" y2="{up:.1f}" stroke="#ddd"/>',
            f'<text x="{LEFT - 8}" y="{up + 4:.1f}" {STYLE} text-anchor="end">{b:.3g}</text>',
            f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 18}" {STYLE} text-anchor="middle">{a:.4g}</text>',
        ]
    points = [at(a, b) for a, b in zip(x, y, strict=True)]
    if bars:
        wide = max(1.0, (WIDTH - LEFT - RIGHT) / len(x) - 1)
        base = HEIGHT - BOTTOM
        parts += [
            f'<rect x="{a - wide / 2:.1f}" y="{b:.1f}" width="{wide:.1f}" height="{base - b:.1f}" fill="#1f77b4"/>'
            for a, b in points
        ]
    else:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="#1f77b4" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>", ""])


def of_training(folder: Path) -> str | None:
    """FVU over the steps of a run's log; None where there is no such log."""
    file = folder / "log.jsonl"
    if not file.is_file():
        return None
    points = {}
    for text in file.read_text(errors="replace").splitlines():
        try:
            record = json.loads(text)
            step, fvu = int(record["step"]), float(record["fvu"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut short when a run was killed
        if math.isfinite(fvu):
            points[step] = fvu  # a resumed run writes some steps again
    if len(points) < 2:
        return None
    steps = sorted(points)
    return line(
        "FVU (fraction of variance unexplained) in training", "step", steps, [points[s] for s in steps]
    )


def of_density(folder: Path) -> str | None:
    """Histogram of how often features fire, from a run's eval.json; None where it has no densities."""
    file = folder / "eval.json"
    if not file.is_file():
        return None
    measured = json.loads(file.read_text())["measures"].get("density", {}).get("value")
    shares = [math.log10(v) for v in measured if v and v > 0] if isinstance(measured, list) else []
    if not shares:
        return None
    low = math.floor(min(shares))
    counts = [0] * max(1, -low * 10)
    for share in shares:
        counts[min(len(counts) - 1, int((share - low) * 10))] += 1
    middles = [low + (i + 0.5) / 10 for i in range(len(counts))]
    return line("Features by how often they fire", "log10 of the share of tokens", middles, counts, bars=True)
