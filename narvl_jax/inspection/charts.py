"""Curves as inline SVG, in the colours of the page."""

import math
from collections.abc import Mapping, Sequence

from narvl_jax.inspection import markup
from narvl_jax.inspection.markup import Markup, element

Points = Sequence[tuple[float, float]]

# Okabe and Ito: distinguishable with any colour vision, on light and dark.
_COLOURS = (
  *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
  "#8a8a8a",
)
_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 10, 26
# Above this ratio of the largest to the smallest value the axis is logarithmic.
_WIDE = 20
_DASHES = ("", "6 3", "2 3")


def line_chart(
  title: str, curves: Mapping[str, Points], marks: Sequence[float] = ()
) -> Markup:
  """Returns a chart with a legend.

  Args:
    title: title of the chart; a logarithmic axis is named in it.
    curves: name -> (x, y) in order of x, finite. Those without points are left
      out.
    marks: x of vertical dashed lines.
  """
  curves = {name: points for name, points in curves.items() if points}
  if not curves:
    return markup.missing(f"{title}: no values")
  xs = [x for points in curves.values() for x, _ in points]
  ys = [y for points in curves.values() for _, y in points]
  log = min(ys) > 0 and max(ys) > _WIDE * min(ys)
  across = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
  up = _Axis(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP, log=log)
  parts = [*_grid(across, up)]
  for x in marks:
    parts.append(_line(across(x), across(x), up.start, up.end, dash="3 3"))
  legend = []
  for number, (name, points) in enumerate(curves.items()):
    colour = _COLOURS[number % len(_COLOURS)]
    dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    shown = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
    parts.append(
      element(
        "polyline",
        element("title", name),
        points=shown,
        fill="none",
        stroke=colour,
        stroke_width=1.6,
        stroke_dasharray=dash,
      )
    )
    if len(points) == 1:
      # A line of one point would be invisible.
      center = {
        "cx": f"{across(points[0][0]):.1f}",
        "cy": f"{up(points[0][1]):.1f}",
      }
      parts.append(element("circle", r=3, fill=colour, **center))
    last = _number(points[-1][1])
    swatch = element("span", "\u25a0 ", style=f"color: {colour}")
    legend.append(element("span", swatch, f"{name} {last}", class_="key"))
  drawing = element(
    "svg",
    *parts,
    viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
    width=_WIDTH,
    height=_HEIGHT,
    role="img",
    aria_label=title,
  )
  caption = f"{title} (logarithmic)" if log else title
  return element(
    "figure",
    element("figcaption", caption),
    drawing,
    element("div", *legend, class_="legend"),
  )


class _Axis:
  """Maps values to positions in the drawing."""

  def __init__(
    self,
    low: float,
    high: float,
    start: float,
    end: float,
    *,
    log: bool = False,
  ) -> None:
    if low == high:
      low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    self.low, self.high, self.log = low, high, log
    self.start, self.end = start, end

  def __call__(self, value: float) -> float:
    low, high = self.low, self.high
    if self.log:
      low, high, value = math.log(low), math.log(high), math.log(value)
    share = (value - low) / (high - low)
    return self.start + share * (self.end - self.start)

  def ticks(self) -> list[float]:
    """Returns round values within the axis, at least one."""
    if self.log:
      powers = range(
        math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1
      )
      digits = (1, 2, 5) if len(powers) < 4 else (1,)
      candidates = [m * 10.0**p for p in powers for m in digits]
    else:
      step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
      step *= next(
        m for m in (1, 2, 5, 10) if (self.high - self.low) / (m * step) <= 6
      )
      first = math.ceil(self.low / step)
      candidates = [(first + i) * step for i in range(8)]
    found = [x for x in candidates if self.low <= x <= self.high]
    return found or [self.low, self.high]


def _grid(across: _Axis, up: _Axis) -> list[Markup]:
  parts = []
  for value in up.ticks():
    y = up(value)
    parts.append(_line(across.start, across.end, y, y))
    parts.append(_label(_number(value), across.start - 5, y + 4, "end"))
  for value in across.ticks():
    x = across(value)
    parts.append(_line(x, x, up.start, up.start + 4))
    parts.append(_label(_number(value), x, up.start + 17, "middle"))
  return parts


def _line(x0: float, x1: float, y0: float, y1: float, dash: str = "") -> Markup:
  return element(
    "line",
    x1=f"{x0:.1f}",
    x2=f"{x1:.1f}",
    y1=f"{y0:.1f}",
    y2=f"{y1:.1f}",
    stroke_dasharray=dash,
    class_="axis",
  )


def _label(text: str, x: float, y: float, anchor: str) -> Markup:
  return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _number(value: float) -> str:
  """Returns at most four digits."""
  return f"{value:.4g}"
