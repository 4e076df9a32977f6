"""The few shapes that our SVG is made of. Numbers are pixels; text is escaped here and nowhere else."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

FONT = "ui-sans-serif, system-ui, 'Helvetica Neue', Helvetica, Arial, sans-serif"
#: Width of an average character, in parts of the font's size; wide enough for bold.
CHAR = 0.6


def rect(
    x: float,
    y: float,
    w: float,
    h: float,
    *,
    fill: str,
    stroke: str = "none",
    radius: float = 6,
    width: float = 1,
    opacity: float = 1,
    title: str = "",
) -> str:
    """opacity: of the fill. title: shown when pointed at."""
    inner = f"<title>{escape(title)}</title></rect>" if title else ""
    faint = f' fill-opacity="{opacity}"' if opacity < 1 else ""
    head = (
        f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(w)}" height="{_n(h)}" rx="{_n(radius)}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="{_n(width)}"{faint}'
    )
    return f"{head}>{inner}" if inner else f"{head}/>"


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: float = 12,
    fill: str = "#1f2933",
    anchor: str = "start",
    bold: bool = False,
    turn: bool = False,
    after: str = "",
) -> str:
    """y: the baseline. turn: reads upwards. after: more words behind, lighter and smaller."""
    weight = ' font-weight="600"' if bold else ""
    turned = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if turn else ""
    return (
        f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" fill="{fill}" text-anchor="{anchor}"'
        f"{weight}{turned}>{escape(words)}{_lighter(after, size)}</text>"
    )


def _lighter(words: str, size: float) -> str:
    if not words:
        return ""
    return f'<tspan dx="6" font-size="{_n(size - 1.5)}" font-weight="400" fill="#52606d">{escape(words)}</tspan>'


def path(
    points: list[tuple[float, float]],
    *,
    stroke: str,
    dash: str = "",
    arrow: bool = False,
    width: float = 1.4,
    radius: float = 6,
) -> str:
    """A line through corners, rounded; arrow: at its end."""
    (x, y), *rest = points
    steps = [f"M{_n(x)} {_n(y)}"]
    for i, (cx, cy) in enumerate(rest[:-1]):
        steps.append(
            f"L{_toward((cx, cy), points[i], radius)}Q{_n(cx)} {_n(cy)} {_toward((cx, cy), rest[i + 1], radius)}"
        )
    steps.append(f"L{_n(rest[-1][0])} {_n(rest[-1][1])}")
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    head = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<path d="{"".join(steps)}" fill="none" stroke="{stroke}" stroke-width="{_n(width)}"{dashed}{head}/>'


def page(width: float, height: float, label: str, body: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_n(width)}" height="{_n(height)}" '
        f'viewBox="0 0 {_n(width)} {_n(height)}" font-family="{FONT}" role="img" aria-label={quoteattr(label)}>'
    )
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#5b6570"/></marker></defs>'
    )
    return "\n".join([head, arrow, rect(0, 0, width, height, fill="#ffffff", radius=0), *body, "</svg>"]) + "\n"


def fitted(words: str, room: float, *, size: float) -> str:
    """Cut to about `room` pixels."""
    most = int(room / (CHAR * size))
    return words if len(words) <= most else words[: max(0, most - 3)].rstrip() + "..."


def wide(words: str, *, size: float) -> float:
    return len(words) * CHAR * size


def _toward(at: tuple[float, float], to: tuple[float, float], by: float) -> str:
    """The point `by` pixels from `at` towards `to` (lines are level or upright), at most half way."""
    dx, dy = to[0] - at[0], to[1] - at[1]
    by = min(by, max(abs(dx), abs(dy)) / 2)
    return f"{_n(at[0] + by * _sign(dx))} {_n(at[1] + by * _sign(dy))}"


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
