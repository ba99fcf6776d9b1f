"""Draw the figures of docs/routing.md as SVG: `python docs/draw_routing.py`.

The first is a real routing of eight capsules to two classes, the second says where the numbers of a tile are, the third
is of the tables in recipes/results. tests/test_site.py compares the files with what this draws.
"""

import csv
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INK, PALE, BLUE, ORANGE, GREEN = "#24292f", "#8b949e", "#0b5cad", "#bc4c00", "#1a7f37"


def _text(
    x: float, y: float, text: str, size: int = 14, anchor: str = "middle", colour: str = INK, style: str = ""
) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{style}>{text}</text>'


def _bold(x: float, y: float, text: str, size: int = 15, anchor: str = "middle", colour: str = INK) -> str:
    return _text(x, y, text, size, anchor, colour, ' font-weight="600"')


def _arrow(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, opacity: float = 1.0) -> str:
    """A line with a head whose size goes with its width."""
    angle, head = math.atan2(y2 - y1, x2 - x1), 4 + 2.2 * width
    sides = [(x2 - head * math.cos(angle + turn), y2 - head * math.sin(angle + turn)) for turn in (-0.42, 0.42)]
    neck = x2 - 0.8 * head * math.cos(angle), y2 - 0.8 * head * math.sin(angle)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(x2, y2), *sides])
    return (
        f'<g opacity="{opacity:.2f}"><line x1="{x1:.1f}" y1="{y1:.1f}" x2="{neck[0]:.1f}" y2="{neck[1]:.1f}" '
        f'stroke="{colour}" stroke-width="{width:g}"/><polygon points="{points}" fill="{colour}"/></g>'
    )


def _box(
    x: float, y: float, width: float, height: float, stroke: str = PALE, fill: str = "#ffffff", more: str = ""
) -> str:
    size = f'width="{width:g}" height="{height:g}" rx="6"'
    return f'<rect x="{x:g}" y="{y:g}" {size} fill="{fill}" stroke="{stroke}"{more}/>'


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" role="img"><title>{title}</title>\n'
    )
    return head + "\n".join([f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>', *parts]) + "\n</svg>\n"


# Votes of eight capsules for two classes, as (angle in degrees, length): for the first most agree, for the second none.
_VOTES = [
    [(38, 0.92), (50, 0.98), (28, 0.96), (58, 0.88), (44, 0.99), (33, 0.8), (205, 0.75), (118, 0.8)],
    [(15, 0.9), (100, 0.96), (190, 0.9), (280, 0.92), (145, 0.85), (330, 0.88), (238, 0.85), (60, 0.8)],
]


def route(votes: list[list[tuple[float, float]]], num_iters: int) -> list[tuple[list[list[float]], list[list[float]]]]:
    """Couplings ``[J][I]`` and class capsules ``[J][2]`` of each iteration: procedure 1 of Sabour et al. 2017."""
    logits = [[0.0] * len(votes[0]) for _ in votes]
    iterations = []
    for _ in range(num_iters):
        sums = [sum(math.exp(row[i]) for row in logits) for i in range(len(votes[0]))]
        couplings = [[math.exp(value) / sums[i] for i, value in enumerate(row)] for row in logits]
        capsules = []
        for row, own in zip(couplings, votes, strict=True):
            s = [sum(c * vote[axis] for c, vote in zip(row, own, strict=True)) for axis in (0, 1)]
            square = s[0] ** 2 + s[1] ** 2
            capsules.append([math.sqrt(square) / (1 + square) * value for value in s])
        for row, own, v in zip(logits, votes, capsules, strict=True):
            for i, vote in enumerate(own):
                row[i] += vote[0] * v[0] + vote[1] * v[1]
        iterations.append((couplings, capsules))
    return iterations


def agreement() -> str:
    """Votes, couplings and class capsules over three iterations."""
    votes = [[(r * math.cos(math.radians(a)), r * math.sin(math.radians(a))) for a, r in row] for row in _VOTES]
    parts = []
    for column, (couplings, capsules) in enumerate(route(votes, 3)):
        left = 150 + 200 * column
        parts.append(_bold(left + 90, 28, f"iteration {column + 1}"))
        for row, (own, v) in enumerate(zip(couplings, capsules, strict=True)):
            top, colour = 42 + 200 * row, (BLUE, ORANGE)[row]
            x, y = left + 90, top + 90
            parts.append(_box(left, top, 180, 180, "#d0d7de"))
            parts.append(f'<circle cx="{x}" cy="{y}" r="80" fill="none" stroke="#d0d7de" stroke-dasharray="3 3"/>')
            for c, vote in zip(own, votes[row], strict=True):
                parts.append(_arrow(x, y, x + 80 * vote[0], y - 80 * vote[1], PALE, 0.5 + 5 * c**2, 0.25 + 0.75 * c))
            parts.append(_arrow(x, y, x + 80 * v[0], y - 80 * v[1], colour, 4.5))
            parts.append(_text(left + 172, top + 172, f"length {math.hypot(*v):.2f}", 13, "end", colour))
    for row, (name, text, colour) in enumerate(
        (("class 1", ("the votes", "agree"), BLUE), ("class 2", ("the votes", "do not"), ORANGE))
    ):
        parts.append(_bold(75, 122 + 200 * row, name, 16, "middle", colour))
        parts += [_text(75, 144 + 18 * line + 200 * row, word, 13) for line, word in enumerate(text)]
    parts.append(_text(375, 460, "grey: the vote of each capsule, wide where its coupling is large", 13))
    parts.append(_text(375, 480, "colour: the class capsule, squash of the weighted sum; dashed: length 1", 13))
    return _svg(750, 496, "Votes that agree gain couplings, and the class capsule grows", parts)


def tiles() -> str:
    """What a tile of the fused operator reads, keeps on chip and writes."""
    parts = [_bold(110, 30, "in memory"), _bold(400, 30, "one tile, on chip"), _bold(690, 30, "in memory")]
    for row in range(4):
        for column in range(5):
            here = (row, column) == (1, 2)
            fill, stroke = ("#ddf4ff", BLUE) if here else ("#f6f8fa", "#d0d7de")
            parts.append(_box(45 + 26 * column, 62 + 26 * row, 24, 24, stroke, fill))
    parts += [_text(109, 56, "capsules I", 12), _text(34, 116, "B", 12)]
    parts.append(_text(110, 186, "poses x  [B, I, K]"))
    for top, text in ((206, "sum V  [B, J, D]"), (256, "matrices W  [T, K, J, D]")):
        parts += [_box(20, top, 180, 36), _text(110, top + 23, text)]
    parts.append(_box(270, 44, 260, 290, BLUE, "#f6fbff", ' stroke-dasharray="6 4"'))
    steps = ["G = W V", "logits  x \u00b7 G", "couplings  c = softmax", "y = \u03a3 c x, over a type", "times W"]
    for number, text in enumerate(steps):
        top = 60 + 54 * number
        parts += [_box(300, top, 200, 36, BLUE), _text(400, top + 23, text)]
        if number:
            parts.append(_arrow(400, top - 18, 400, top - 1, BLUE, 1.6))
    parts += [_arrow(178, 124, 297, 132, INK, 1.4), _arrow(202, 220, 297, 74, INK, 1.4)]
    parts += [_arrow(202, 268, 297, 86, INK, 1.4), _arrow(202, 278, 297, 292, INK, 1.4)]
    for top, text in ((276, "parts of s  [B, J, D]"), (196, "v = squash(s)"), (116, "V + v")):
        parts += [_box(600, top, 180, 36), _text(690, top + 23, text)]
    parts += [_arrow(502, 294, 597, 294, INK, 1.4), _arrow(690, 275, 690, 235, INK, 1.4)]
    parts += [_arrow(690, 195, 690, 155, INK, 1.4), _text(700, 259, "in a fixed order", 12, "start")]
    parts.append(
        f'<path d="M780 134 H812 V366 H8 V224 H12" fill="none" stroke="{INK}" stroke-width="1.4"/>'
        + _arrow(8, 224, 19, 224, INK, 1.4)
    )
    parts.append(_text(400, 360, "next iteration", 12))
    parts.append(_text(410, 400, "The votes u = x W  [B, I, J, D] and the logits  [B, I, J] are never in memory.", 14))
    return _svg(822, 418, "The tiles of the fused operator", parts)


def _peaks(file: str) -> dict[str, float]:
    """MiB by variant, of the forward and backward pass of capsnet's routing at batch 128 in float32."""
    with open(ROOT / "recipes" / "results" / file, newline="") as opened:
        return {
            row["variant"]: float(row["peak_mib"])
            for row in csv.DictReader(opened)
            if (row["subject"], row["model"], row["batch_size"]) == ("routing", "capsnet", "128")
            and row["precision"] == "float32"
        }


def memory() -> str:
    """Peak memory of the routing, fused and not."""
    parts, top = [], 58
    names = {"plain": "written plainly", "compiled": "that under torch.compile", "fused": "the fused operator"}
    parts.append(_bold(380, 30, "Peak memory of routing, forward and backward, capsnet at batch 128", 15))
    for title, file in (("two CPU cores", "benchmark-cpu.csv"), ("one H100", "benchmark-h100.csv")):
        peaks = _peaks(file)
        parts.append(_bold(20, top + 18, title, 14, "start"))
        for variant, name in names.items():
            width = 420 * peaks[variant] / 1600
            fill = BLUE if variant == "fused" else PALE
            parts.append(_text(300, top + 18, name, 13, "end"))
            parts.append(f'<rect x="312" y="{top + 2}" width="{width:.1f}" height="22" rx="3" fill="{fill}"/>')
            parts.append(_text(320 + width, top + 18, f"{peaks[variant]:,.0f} MiB", 13, "start"))
            top += 30
        top += 16
    return _svg(800, top + 4, "Peak memory of routing", parts)


FIGURES = {"routing-agreement.svg": agreement, "routing-tiles.svg": tiles, "routing-memory.svg": memory}


def main() -> None:
    folder = ROOT / "docs" / "figures"
    folder.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (folder / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
