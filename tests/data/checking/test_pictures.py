"""check_data on pictures: orientation tags, one colour, lost outlines."""

import dataclasses
import io
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from narvl_jax.data.checking import inspection
from narvl_jax.data.checking import report as check_report
from narvl_jax.data.checking.picture_facts import examine
from narvl_jax.data.example import Record
from narvl_jax.data.pictures.files import with_orientation
from narvl_jax.errors import UserError
from narvl_jax.experiment import data_check
from tests.data.converting import convert
from tests.data.number_source import ListSource, make_tasks
from tests.data.pictures import samples

LIMITS = inspection.Limits(
  image_size=(6, 8), max_text_length=24, max_label_length=9, num_queries=9
)
# Stored as 40 x 24 pixels, seen as 24 x 40.
PHONE = samples.encode(samples.sideways(samples.smooth(24, 40), 6), "JPEG", 6)
PLAIN = samples.encode(samples.smooth(40, 24), "JPEG")
FITS_BOTH = (2.0, 2.0, 20.0, 20.0)
ONLY_UPRIGHT = (2.0, 20.0, 20.0, 38.0)
ONLY_STORED = (20.0, 2.0, 38.0, 20.0)
APPLY = "--config.data.exif_orientation=apply"
IGNORE = "--config.data.exif_orientation=ignore"


@pytest.fixture(scope="module")
def model_tasks() -> dict[str, Any]:
  return make_tasks()


def _source(
  images: list[bytes], boxes: Any = FITS_BOTH, setting: str = "ignore"
) -> ListSource:
  boxes = boxes if isinstance(boxes, list) else [boxes] * len(images)
  return ListSource(
    Record(
      f"g{i}",
      "grounding",
      with_orientation(image, setting),
      "what is one",
      {},
      box,
    )
    for i, (image, box) in enumerate(zip(images, boxes, strict=True))
  )


def _judge(
  source: Any, task: Any, setting: str = "ignore"
) -> tuple[dict[str, Any], check_report.Verdict, str]:
  limits = dataclasses.replace(LIMITS, exif_orientation=setting)
  figures = inspection.inspect(source, task, limits)
  json.dumps(figures)
  verdict = check_report.judge(figures, task.name, eos=task.settings.eos)
  text = check_report.format_figures("x", figures, {})
  return figures, verdict, text


@pytest.mark.parametrize("kind", samples.TAGGED_FORMATS)
def test_sideways_pictures_are_not_good(
  model_tasks: dict[str, Any], kind: str
) -> None:
  """Every box fits both ways, so only the tags decide."""
  pixels = samples.sideways(samples.smooth(24, 40), 6)
  source = _source([samples.encode(pixels, kind, 6)] * 40)
  figures, verdict, text = _judge(source, model_tasks["grounding"])
  assert figures["bad"] == 0
  assert (verdict.word, verdict.flags) == (check_report.USABLE, [APPLY])
  assert verdict.reasons == [
    "40 of 40 pictures have an EXIF orientation, and"
    " data.exif_orientation=ignore has them read as stored, not as people see"
    " them"
  ]
  assert (
    "EXIF           40 of 40 pictures have an orientation tag;"
    " data.exif_orientation=ignore: they are read as stored"
  ) in text
  # With the flag they are good, and the report describes it.
  source = _source([samples.encode(pixels, kind, 6)] * 40, setting="apply")
  _, verdict, text = _judge(source, model_tasks["grounding"], "apply")
  assert verdict == (check_report.GOOD, [], [])
  assert "data.exif_orientation=apply: they are turned upright" in text


@pytest.mark.parametrize("task", ["caption", "vqa", "entailment"])
def test_other_tasks(model_tasks: dict[str, Any], task: str) -> None:
  answers = {"yes" if task == "entailment" else "one": 1.0}
  source = ListSource(
    Record(f"{i}", task, image, "what is one", answers)
    for i, image in enumerate([PHONE, PLAIN] * 5)
  )
  _, verdict, text = _judge(source, model_tasks[task])
  assert verdict.flags == [APPLY]
  assert "5 of 10 pictures have an orientation tag" in text


def test_boxes_of_upright_pictures(model_tasks: dict[str, Any]) -> None:
  """They are bad records, and the data are not at fault."""
  task = model_tasks["grounding"]
  figures, verdict, _ = _judge(_source([PHONE] * 40, ONLY_UPRIGHT), task)
  assert figures["bad"] == 40
  assert (verdict.word, verdict.flags) == (check_report.USABLE, [APPLY])
  assert "40 boxes fit only pictures turned upright" in verdict.reasons[0]
  boxes = [ONLY_UPRIGHT] * 15 + [FITS_BOTH] * 25
  figures, verdict, _ = _judge(_source([PHONE] * 40, boxes), task)
  assert figures["bad"] == 15
  assert (verdict.word, verdict.flags) == (check_report.USABLE, [APPLY])
  source = _source([PHONE] * 40, boxes, "apply")
  figures, verdict, _ = _judge(source, task, "apply")
  assert figures["bad"] == 0
  assert verdict.word == check_report.GOOD
  # The flag does not correct these; they remain faults of the data.
  source = _source([PHONE] * 10 + [PLAIN] * 10, ONLY_UPRIGHT)
  _, verdict, _ = _judge(source, task)
  assert verdict.word == check_report.NOT_USABLE
  assert "50.00% of the records are bad" in verdict.reasons[0]


def test_boxes_of_pictures_as_stored(model_tasks: dict[str, Any]) -> None:
  task = model_tasks["grounding"]
  boxes = [ONLY_STORED] * 3 + [FITS_BOTH] * 37
  figures, verdict, _ = _judge(_source([PHONE] * 40, boxes), task)
  assert figures["bad"] == 0
  assert (verdict.word, verdict.flags) == (check_report.GOOD, [])
  assert "3 boxes fit only these, so that it is right" in verdict.reasons[0]
  source = _source([PHONE] * 40, boxes, "apply")
  figures, verdict, _ = _judge(source, task, "apply")
  assert figures["bad"] == 3
  assert (verdict.word, verdict.flags) == (check_report.USABLE, [IGNORE])
  assert "3 boxes fit only pictures as stored" in verdict.reasons[0]


def test_no_tags(model_tasks: dict[str, Any]) -> None:
  _, verdict, text = _judge(_source([PLAIN] * 9), model_tasks["grounding"])
  assert verdict == (check_report.GOOD, [], [])
  assert "EXIF" not in text


def test_sources_that_need_different_settings() -> None:
  def verdict(flag: str) -> check_report.Verdict:
    return check_report.Verdict(check_report.USABLE, ["x"], [flag])

  merged = check_report.merge({"a": verdict(APPLY), "b": verdict(APPLY)})
  assert merged.flags == [APPLY]
  merged = check_report.merge({"a": verdict(APPLY), "b": verdict(IGNORE)})
  assert merged.word == check_report.NOT_USABLE
  assert "convert one of them" in merged.reasons[0]


def _drawn(
  ground: tuple[int, ...], ink: tuple[int, ...], mode: str = "RGBA"
) -> bytes:
  """A ring with a soft edge, in ink on a ground."""
  large = Image.new("L", (512, 384))
  ImageDraw.Draw(large).ellipse((100, 60, 400, 340), outline=255, width=40)
  mask = large.resize((128, 96), Image.Resampling.LANCZOS)
  pixels = np.where(np.asarray(mask)[..., None] > 0, ink[:3], ground[:3])
  alpha = np.asarray(mask) / 255 * (ink[3] - ground[3]) + ground[3]
  pixels = np.dstack([pixels, alpha]).astype(np.uint8)
  file = io.BytesIO()
  picture = Image.fromarray(pixels)
  picture.convert(mode).save(
    file, "WEBP" if mode == "RGBA" else "PNG", lossless=True, exact=True
  )
  return file.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_that_hides_the_drawing(mode: str) -> None:
  black, white, clear = (0, 0, 0, 255), (255, 255, 255, 255), (0, 0, 0, 0)
  assert examine(_drawn(clear, black, mode)) == (True, True)
  assert examine(_drawn((255, 255, 255, 0), white, mode)) == (True, True)
  # These show without transparency.
  assert examine(_drawn((255, 255, 255, 0), black, mode)) == (False, False)
  assert examine(_drawn(clear, white, mode)) == (False, False)
  assert examine(_drawn(white, black, mode)) == (False, False)
  # As transparent all over as a watermark: nothing is drawn by it.
  assert examine(_drawn((9, 9, 9, 90), (200, 9, 9, 90), mode)) == (False, False)


def test_colors_on_a_transparent_ground() -> None:
  rng = np.random.default_rng(0)
  pixels = np.asarray(
    Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((128, 96))
  )
  alpha = np.zeros((96, 128), np.uint8)
  alpha[20:60, 30:90] = 255
  cut = np.dstack([pixels, alpha])
  # The model sees the whole of a photograph that was cut out.
  assert examine(samples.encode(cut)) == (False, False)
  cut[alpha == 0] = 0
  assert examine(samples.encode(cut)) == (False, False)
  # Most of a drawing in two colours is lost.
  cut[20:60, 30:80, :3] = 0
  assert examine(samples.encode(cut)) == (False, True)
  for size in ((1, 1), (1, 9), (9, 1), (3, 2)):
    tiny = np.zeros((*size, 4), np.uint8)
    tiny[0, 0, 3] = 255
    assert examine(samples.encode(tiny)).one_color


def test_palette_with_a_transparent_color() -> None:
  picture = Image.new("P", (40, 30), 0)
  picture.putpalette([0, 0, 0, 0, 0, 0, 250, 10, 10])
  ImageDraw.Draw(picture).rectangle((5, 5, 20, 20), fill=1)
  for kind in ("PNG", "GIF"):
    file = io.BytesIO()
    picture.save(file, kind, transparency=0, optimize=False)
    assert examine(file.getvalue()) == (True, True)
  ImageDraw.Draw(picture).rectangle((5, 5, 20, 20), fill=2)
  file = io.BytesIO()
  picture.save(file, "PNG", transparency=0)
  assert examine(file.getvalue()) == (False, False)


def test_one_color() -> None:
  flat = np.full((20, 20, 3), 128, np.uint8)
  for data in (
    samples.encode(flat),
    samples.encode(flat, "JPEG"),
    samples.encode(flat + np.eye(20, dtype=np.uint8)[..., None]),
    # Values of 9 bits on the scale of 16.
    samples.png_16(np.arange(400, dtype=np.uint16).reshape(20, 20, 1)),
  ):
    assert examine(data) == (True, False)
  assert examine(PLAIN) == (False, False)
  # Values of 8 bits are read as such.
  bits = np.arange(256, dtype=np.uint16).reshape(16, 16, 1)
  assert examine(samples.png_16(bits)) == (False, False)
  with pytest.raises(UserError, match="damaged or cut off"):
    examine(PLAIN[:-100])


def test_invisible_characters_are_reported(model_tasks: dict[str, Any]) -> None:
  black = samples.encode(np.zeros((24, 40, 3), np.uint8))
  hidden = _drawn((0, 0, 0, 0), (0, 0, 0, 255))
  source = _source([PLAIN, black, PLAIN, hidden, PLAIN])
  figures, verdict, text = _judge(source, model_tasks["grounding"])
  pictures = figures["pictures"]
  assert pictures["one_color"] == {"count": 2, "example": "list.tsv row 2"}
  assert pictures["hidden"] == {"count": 1, "example": "list.tsv row 4"}
  assert verdict.word == check_report.GOOD
  expected = [
    "2 of 5 pictures, such as list.tsv row 2, end as one colour, so that",
    "1 of 5 pictures, such as list.tsv row 4, have an outline that only",
  ]
  for reason, start in zip(verdict.reasons, expected, strict=True):
    assert reason.startswith(start)
    assert f"warning        {start}" in text


def test_command(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The setting of a source without a config."""
  (tmp_path / "1.jpg").write_bytes(PHONE)
  row = {"image": "1.jpg", "prompt": "one", "target": ONLY_UPRIGHT}
  path = tmp_path / "own.jsonl"
  path.write_text((json.dumps(row) + "\n") * 5)
  vocabulary = make_tasks()["grounding"].vocabulary
  convert(tmp_path / "out", str(path), split="train", exif_orientation="apply")
  entry = data_check.open_spec(str(tmp_path / "out"), "", "")
  figures, verdict, _ = data_check.check(entry, vocabulary)
  assert figures["limits"]["exif_orientation"] == "apply"
  assert verdict.word == check_report.GOOD
  words = []
  for setting in ("ignore", "apply"):
    entry = data_check.open_spec(str(path), "grounding", "", setting)
    figures, verdict, _ = data_check.check(entry, vocabulary)
    assert figures["limits"]["exif_orientation"] == setting
    words.append((verdict.word, figures["bad"]))
  assert words == [(check_report.USABLE, 5), (check_report.GOOD, 0)]
