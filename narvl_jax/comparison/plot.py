"""Plot of decoder time against the length of the answer."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

from narvl_jax.errors import UserError
from narvl_jax.files.disk import replacing

_SIZE = (6.4, 4.0)
_DPI = 150


def check_can_draw() -> None:
  """Raises UserError if matplotlib is not installed."""
  if importlib.util.find_spec("matplotlib") is None:
    raise UserError(
      "the plot of the decoder times needs the package matplotlib:"
      ' pip install "narvl_jax[plots]", or --lengths= for no plot'
    )


def draw_lengths(path: pathlib.Path, lengths: Mapping[str, Any]) -> None:
  """Writes a PNG of the curves, with a band up to the 95th percentile.

  Args:
    lengths: "task", "batch" and "curves": label -> "lengths", "decoder_ms"
      and "p95_ms". Curves whose number of queries grows are dashed.

  Raises:
    UserError: the file cannot be written.
  """
  # Here, because matplotlib is optional; the backend opens no window.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=_SIZE, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for label, curve in lengths["curves"].items():
    style = "--" if label.endswith("a token") else "-"
    (line,) = axes.plot(
      curve["lengths"],
      curve["decoder_ms"],
      marker="o",
      markersize=3,
      linestyle=style,
      label=label,
    )
    axes.fill_between(
      curve["lengths"],
      curve["decoder_ms"],
      curve["p95_ms"],
      color=line.get_color(),
      alpha=0.15,
      linewidth=0,
    )
  axes.set_xlabel("tokens of the answer")
  axes.set_ylabel("decoder time, ms")
  axes.set_title(f"{lengths['task']}, batch {lengths['batch']}")
  axes.set_xlim(left=0)
  axes.set_ylim(bottom=0)
  axes.grid(alpha=0.3)
  axes.legend()
  with replacing(path) as temporary:
    figure.savefig(temporary, format="png", dpi=_DPI)
