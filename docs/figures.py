"""Draws the figures of the documentation into docs/images.

    pip install -e ".[plots]"
    python docs/figures.py [--workdir=runs/shapes]

Without a run folder only the diagram is drawn. With one, the first examples of
its test split and the answers of its best checkpoint become predictions.png,
and Chromium, if it is installed, draws the top of its report as report.png.
"""

import pathlib
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Sequence

from absl import app, flags
from matplotlib import patches
from matplotlib import pyplot as plt
from PIL import Image

from narvl_jax.predict import predict
from narvl_jax.prediction.request import Request
from narvl_jax.report import report

IMAGES = pathlib.Path(__file__).parent / "images"
_INK, _FAINT = "#1f2933", "#9aa5b1"
_BOX, _BLANK, _ANSWER = "#d9e8fb", "#f0f1f3", "#d5f0df"
_ANSWER_TOKENS = ("a", "red", "circle")
# What each query emits; "-" is blank.
_QUERIES = ("-", "a", "red", "red", "-", "circle")

# Of the picture of predictions: rows, and examples of each.
_TASKS = {
  "vqa": "question answering",
  "grounding": "grounding",
  "caption": "captioning",
  "entailment": "entailment",
}
_EXAMPLES = 2

# Of the picture of a report, in pixels.
_REPORT_SIZE = (1280, 1240)

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Trained run, for the picture of predictions."
)


def main(argv: Sequence[str]) -> None:
  """Draws the diagram and, for a run, its predictions."""
  del argv
  IMAGES.mkdir(exist_ok=True)
  plt.rcParams.update({"svg.hashsalt": "narvl", "font.family": "DejaVu Sans"})
  _one_pass(IMAGES / "one_pass.svg")
  print(f"wrote {IMAGES / 'one_pass.svg'}")
  if _WORKDIR.value:
    _predictions(IMAGES / "predictions.png", _WORKDIR.value)
    print(f"wrote {IMAGES / 'predictions.png'}")
    if browser := shutil.which("chromium"):
      _report(IMAGES / "report.png", _WORKDIR.value, browser)
      print(f"wrote {IMAGES / 'report.png'}")


def _predictions(path: pathlib.Path, workdir: str) -> None:
  """Draws the first test examples of each task with the model's answers."""
  figure, rows = plt.subplots(
    _EXAMPLES, len(_TASKS), figsize=(11.2, 6.4), layout="constrained"
  )
  for column, (task, title) in enumerate(_TASKS.items()):
    for index in range(_EXAMPLES):
      _draw_prediction(rows[index][column], workdir, task, index)
    rows[0][column].annotate(
      title,
      (0.5, 1.24),
      xycoords="axes fraction",
      ha="center",
      fontsize=13,
      weight="bold",
    )
  figure.savefig(path, dpi=100, metadata={"Software": None})
  plt.close(figure)


def _draw_prediction(
  axes: plt.Axes, workdir: str, task: str, index: int
) -> None:
  found = predict(workdir, Request(task=task, example=index))
  with Image.open(found["image"]) as image:
    axes.imshow(image.convert("RGB"), interpolation="nearest")
  axes.set_xticks([])
  axes.set_yticks([])
  answer = str(found["answer"])
  if task == "grounding":
    answer = "no box"
    if found["answer"] is not None:
      _draw_box(axes, found["answer"])
      answer = "red box"
  elif answer != str(found["truth"]):
    answer += f" (truth: {found['truth']})"
  # Above the picture is what was asked, below it the answer of the model.
  axes.set_title(textwrap.fill(found["prompt"] or "", 30), fontsize=10)
  axes.set_xlabel(
    textwrap.fill(answer, 28), fontsize=11, color="#0b5394", weight="bold"
  )


def _draw_box(axes: plt.Axes, box: Sequence[float]) -> None:
  x0, y0, x1, y1 = box
  axes.add_patch(
    patches.Rectangle(
      # Pixels are centred on whole numbers.
      (x0 - 0.5, y0 - 0.5),
      x1 - x0,
      y1 - y0,
      fill=False,
      edgecolor="red",
      linewidth=2.5,
    )
  )


def _report(path: pathlib.Path, workdir: str, browser: str) -> None:
  """Draws the top of the page that `narvl_jax.report` writes about a run."""
  width, height = _REPORT_SIZE
  with tempfile.TemporaryDirectory() as folder:
    page = report(workdir, pathlib.Path(folder) / "report.html")
    options = (
      *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
      f"--user-data-dir={folder}/profile",
      f"--window-size={width},{height}",
      f"--screenshot={path.resolve()}",
    )
    subprocess.run([browser, *options, page.as_uri()], check=True)
  with Image.open(path) as drawn:
    small = drawn.convert("RGB").quantize(128)
  small.save(path, optimize=True)


def _one_pass(path: pathlib.Path) -> None:
  """Draws an autoregressive decoder beside the parallel one."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.5))
  for axes in (left, right):
    axes.set_axis_off()
    axes.set_xlim(0, 6.4)
    axes.set_ylim(-0.55, 3.6)
  left.set_title("Autoregressive: one decoder pass a token", fontsize=11)
  right.set_title("NARVL: one pass for the whole answer", fontsize=11)
  _draw_autoregressive(left)
  _draw_parallel(right)
  figure.tight_layout()
  figure.savefig(path, metadata={"Date": None})
  plt.close(figure)


def _draw_autoregressive(axes: plt.Axes) -> None:
  inputs = ("<s>", *_ANSWER_TOKENS)
  outputs = (*_ANSWER_TOKENS, "</s>")
  for i, (token, said) in enumerate(zip(inputs, outputs, strict=True)):
    x = 0.2 + 1.55 * i
    _cell(axes, x, 0.0, token, _BLANK)
    _cell(axes, x, 1.2, f"pass {i + 1}", _BOX)
    _cell(axes, x, 2.4, said, _ANSWER)
    _arrow(axes, (x + 0.55, 0.6), (x + 0.55, 1.2))
    _arrow(axes, (x + 0.55, 1.8), (x + 0.55, 2.4))
    if i + 1 < len(inputs):
      # The next pass cannot begin before this token is known.
      _arrow(axes, (x + 1.1, 2.55), (x + 1.6, 0.6), _FAINT)
  axes.text(3.2, -0.4, "4 passes, one after another", ha="center", color=_INK)


def _draw_parallel(axes: plt.Axes) -> None:
  axes.add_patch(
    patches.FancyBboxPatch(
      (0.2, 1.0),
      6.0,
      0.6,
      boxstyle="round,pad=0.02",
      facecolor=_BOX,
      edgecolor=_INK,
      linewidth=0.8,
    )
  )
  axes.text(3.2, 1.3, "pass 1", ha="center", va="center", color=_INK)
  for i, token in enumerate(_QUERIES):
    x = 0.2 + 1.01 * i
    _cell(axes, x, 0.0, f"query {i + 1}", _BLANK, width=0.92, size=7.5)
    blank = token == "-"
    _cell(
      axes,
      x,
      2.0,
      "blank" if blank else token,
      _BLANK if blank else _ANSWER,
      width=0.92,
      faint=blank,
    )
    _arrow(axes, (x + 0.46, 0.6), (x + 0.46, 1.0))
    _arrow(axes, (x + 0.46, 1.6), (x + 0.46, 2.0))
  axes.text(
    3.2,
    3.05,
    f"merge repeats, drop blanks  \N{RIGHTWARDS ARROW}"
    f"  “{' '.join(_ANSWER_TOKENS)}”",
    ha="center",
    color=_INK,
  )
  axes.text(3.2, -0.4, "1 pass for any length", ha="center", color=_INK)


def _cell(
  axes: plt.Axes,
  x: float,
  y: float,
  text: str,
  color: str,
  *,
  width: float = 1.1,
  size: float = 9.0,
  faint: bool = False,
) -> None:
  axes.add_patch(
    patches.FancyBboxPatch(
      (x, y),
      width,
      0.6,
      boxstyle="round,pad=0.02",
      facecolor=color,
      edgecolor=_FAINT if faint else _INK,
      linewidth=0.8,
    )
  )
  axes.text(
    x + width / 2,
    y + 0.3,
    text,
    ha="center",
    va="center",
    fontsize=size,
    color=_FAINT if faint else _INK,
  )


def _arrow(
  axes: plt.Axes,
  start: tuple[float, float],
  end: tuple[float, float],
  color: str = _INK,
) -> None:
  axes.annotate(
    "",
    xy=end,
    xytext=start,
    arrowprops={"arrowstyle": "->", "color": color, "linewidth": 0.9},
  )


if __name__ == "__main__":
  app.run(main)
