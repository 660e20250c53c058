"""The picture of the length curves."""

import pathlib

from PIL import Image

from narvl_jax.comparison.plot import draw_lengths


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
