"""The picture of the length curves."""

import importlib.util
import pathlib

import pytest
from PIL import Image

from narvl_jax.comparison.comparison import compare
from narvl_jax.comparison.options import Options
from narvl_jax.comparison.plot import draw_lengths
from narvl_jax.errors import UserError


def test_picture_is_written(tmp_path: pathlib.Path) -> None:
  curve = {"lengths": [1, 4], "decoder_ms": [2.0, 8.0], "p95_ms": [3.0, 9.0]}
  flat = {"lengths": [1, 4], "decoder_ms": [2.0, 2.0], "p95_ms": [2.0, 2.5]}
  curves = {"AR greedy": curve, "NAR greedy, a query a token": flat}
  path = tmp_path / "new" / "latency.png"
  draw_lengths(path, {"task": "caption", "batch": 1, "curves": curves})
  with Image.open(path) as image:
    assert image.width > 600
    colors = image.convert("RGB").getcolors(1 << 20)
  assert colors is not None
  assert len(colors) > 10
  assert [p.name for p in path.parent.iterdir()] == ["latency.png"]


def test_without_matplotlib_nothing_is_measured(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"matplotlib.*\[plots\].*--lengths="):
    compare(Options(size="micro", to=str(tmp_path / "new")))
  assert not (tmp_path / "new").exists()
