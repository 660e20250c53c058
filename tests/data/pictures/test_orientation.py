"""EXIF orientation: one setting, the same in every format and on every path."""

import base64
import dataclasses
import io
import json
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from narvl_jax.configs.own_data import get_config
from narvl_jax.data.checking import samples as check_samples
from narvl_jax.data.example import Record
from narvl_jax.data.pictures import images
from narvl_jax.data.shards import records
from narvl_jax.data.sources import load_source
from narvl_jax.errors import UserError
from narvl_jax.evaluation.results import make_panel
from narvl_jax.experiment.config import (
  default_config,
  evaluation_source,
  train_source,
)
from narvl_jax.experiment.config_checks import validate
from narvl_jax.experiment.datasets import load_dataset, load_mixture
from narvl_jax.prediction.request import read_picture
from tests.data.converting import convert
from tests.data.number_source import make_tasks
from tests.data.pictures import samples
from tests.support.batches import eval_batches

PIXELS = samples.smooth(40, 24)
# Largest difference that JPEG makes.
TOLERANCE = 4


def _same(found: Any, expected: np.ndarray) -> None:
  assert np.shape(found) == expected.shape
  assert np.abs(np.asarray(found).astype(int) - expected).max() <= TOLERANCE


def _own_size(image: Any) -> np.ndarray:
  width, height = images.original_size(image)
  return images.prepare_image(image, (height, width))


@pytest.mark.parametrize("kind", [*samples.TAGGED_FORMATS, "TIFF, packed"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format(kind: str, orientation: int) -> None:
  kind, _, packed = kind.partition(", ")
  options = {"compression": "tiff_lzw"} if packed else {}
  data = samples.encode(PIXELS, kind, orientation, **options)
  assert images.orientation(data) == orientation
  _same(_own_size(images.with_orientation(data, "ignore")), PIXELS)
  applied = _own_size(images.with_orientation(data, "apply"))
  _same(applied, samples.upright(PIXELS, orientation))


def test_same_pixels_as_of_the_upright_file() -> None:
  """A picture is turned before it is resized and cropped."""
  for orientation in range(2, 9):
    stored = samples.sideways(PIXELS, orientation)
    data = images.Upright(samples.encode(stored, "PNG", orientation))
    for change in (None, images.Change(crop=(0.1, 0.2, 0.7, 0.9), flip=True)):
      np.testing.assert_array_equal(
        images.prepare_image(data, (16, 20), change),
        images.prepare_image(PIXELS, (16, 20), change),
      )


@pytest.mark.parametrize("zipped", [False, True])
def test_png_tags_in_other_places(zipped: bool) -> None:
  data = samples.encode(PIXELS, "PNG", 6)
  tag = data[data.index(b"eXIf") - 4 :]
  tag = tag[: 12 + int.from_bytes(tag[:4], "big")]
  end = data.index(b"IEND") - 4
  late = data.replace(tag, b"")
  late = late[: end - len(tag)] + tag + late[end - len(tag) :]
  text = PngImagePlugin.PngInfo()
  xmp = '<rdf:Description tiff:Orientation="6"/>'
  text.add_itxt("XML:com.adobe.xmp", xmp, zip=zipped)
  for file in (late, samples.encode(PIXELS, "PNG", pnginfo=text)):
    assert images.orientation(file) == 6
    assert images.original_size(file) == (40, 24)
    assert images.original_size(images.Upright(file)) == (24, 40)
    _same(_own_size(images.Upright(file)), samples.upright(PIXELS, 6))
    _same(_own_size(file), PIXELS)


def test_no_tag_or_a_damaged_one() -> None:
  files = [samples.encode(PIXELS, kind) for kind in samples.TAGGED_FORMATS]
  files += [samples.encode(PIXELS, "JPEG", value) for value in (9, 255, 65535)]
  files.append(samples.encode(PIXELS, "JPEG", exif=b"Exif\0\0" + b"\xff" * 20))
  files.append(samples.encode(PIXELS, "BMP"))
  for data in files:
    assert images.orientation(data) == 1
    _same(_own_size(images.Upright(data)), PIXELS)
  assert images.with_orientation(PIXELS, "apply") is PIXELS
  assert images.orientation(PIXELS) == 1


def test_16_bits_and_palettes_are_turned() -> None:
  for picture in (
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257),
    Image.fromarray(PIXELS).convert("L"),
  ):
    exif = Image.Exif()
    exif[samples.ORIENTATION] = 6
    for kind in ("PNG", "TIFF"):
      file = io.BytesIO()
      picture.save(file, kind, exif=exif)
      data = file.getvalue()
      plain = _own_size(data)
      assert plain.shape == (24, 40, 3)
      turned = _own_size(images.Upright(data))
      np.testing.assert_array_equal(turned, samples.upright(plain, 6))


def test_upright_bytes_travel() -> None:
  image = images.with_orientation(samples.encode(PIXELS, "JPEG", 6), "apply")
  assert isinstance(image, images.Upright)
  copied = pickle.loads(pickle.dumps(image))
  assert type(copied) is images.Upright
  assert copied == bytes(image)
  assert images.with_orientation(image, "apply") is image
  record = Record("1", "vqa", image, "what?", {"x": 1.0})
  assert dataclasses.replace(record, prompt="other").image is image
  # What is stored is the file as it was.
  assert records.deserialize(records.serialize(record)).image == bytes(image)


BOX = (2.0, 3.0, 20.0, 38.0)


def _write(folder: pathlib.Path, kind: str = "JPEG") -> dict[str, str]:
  """Writes a sideways picture with a box of the upright one, as two files."""
  stored = samples.sideways(samples.smooth(24, 40), 6)
  data = samples.encode(stored, kind, 6)
  (folder / "phone.img").write_bytes(data)
  row = {"image": "phone.img", "prompt": "what is one", "target": BOX}
  (folder / "own.jsonl").write_text(json.dumps(row) + "\n")
  fields = ["1", "1", "what is one", ",".join(map(str, BOX))]
  fields.append(base64.b64encode(data).decode())
  (folder / "own.tsv").write_text("\t".join(fields) + "\n")
  return {
    "jsonl": str(folder / "own.jsonl"),
    "ofa_tsv": str(folder / "own.tsv"),
  }


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("name", ["jsonl", "ofa_tsv", "array_record"])
def test_sources(tmp_path: pathlib.Path, kind: str, name: str) -> None:
  """Size, pixels, box and labels agree, in training and in evaluation."""
  paths = _write(tmp_path, kind)
  if name == "array_record":
    convert(tmp_path / "out", paths["jsonl"], split="train")
    paths[name] = str(tmp_path / "out")
  config = default_config("grounding")
  assert config.data.exif_orientation == "ignore"
  options: dict[str, Any] = {"path": paths[name]}
  config.data.train.own = train_source(name, "grounding", **options)
  config.data.evaluation.own = evaluation_source(name, "grounding", **options)
  task = make_tasks()["grounding"]

  def sources() -> Any:
    return [load_mixture(config)[0][0], load_dataset(config, "own", "train")]

  for source in sources():
    record = source[0]
    assert images.original_size(record.image) == (40, 24)
    with pytest.raises(UserError, match="outside its picture of 40 x 24"):
      task.encode(record)
  config.data.exif_orientation = "apply"
  validate(config, fit=False)
  for source in sources():
    for copied in (source, pickle.loads(pickle.dumps(source))):
      record = copied[0]
      assert images.original_size(record.image) == (24, 40)
      _same(_own_size(record.image), samples.smooth(24, 40))
      encoded = task.encode(record)
      box: Any = task.decode(encoded.label_ids[:-1], (24, 40))
      np.testing.assert_allclose(box, BOX, atol=40 / 15)
  shapes = {"image_size": (40, 24), "max_text_length": 24}
  batches = eval_batches(
    sources()[1], task, batch_size=1, max_label_length=9, **shapes
  )
  batch, _ = next(batches)
  _same(batch["image"][0], samples.smooth(24, 40))
  assert batch["label_length"][0] == 5


def test_converted_to_jpeg(tmp_path: pathlib.Path) -> None:
  """Resizing removes the tag, so the conversion decides the orientation."""
  path = _write(tmp_path)["jsonl"]
  reported: dict[str, list[str]] = {"ignore": [], "apply": []}
  for setting, lines in reported.items():
    done = convert(
      tmp_path / setting,
      path,
      split="train",
      image_size=24,
      exif_orientation=setting,
      log=lines.append,
    )
    # Older manifests do not have the key.
    expected = {"exif_orientation": "apply"} if setting == "apply" else {}
    assert {
      key: value for key, value in done.image.items() if key[0] == "e"
    } == {"encoding": "jpeg", **expected}
  assert "--exif_orientation=apply turns them upright" in reported["ignore"][-1]
  assert "1 pictures have an EXIF orientation" in reported["apply"][-1]
  assert reported["apply"][-1].endswith("they were turned upright")
  for setting in ("ignore", "apply"):
    source = load_source(
      "array_record",
      task="grounding",
      split="train",
      path=str(tmp_path / "apply"),
      exif_orientation=setting,
    )
    record = source[0]
    expected = images.prepare_image(samples.smooth(24, 40), (24, 24))
    found = images.prepare_image(record.image, (24, 24))
    assert np.abs(found.astype(int) - expected).mean() < 6
    assert record.box == pytest.approx((2, 1.8, 20, 22.8))
  with pytest.raises(UserError, match="exif_orientation"):
    convert(
      tmp_path / "apply",
      path,
      split="train",
      image_size=24,
      exif_orientation="ignore",
    )


def test_converted_as_they_are(tmp_path: pathlib.Path) -> None:
  """With the flag the conversion decides; otherwise the run's config."""
  path = _write(tmp_path)["jsonl"]
  folders = [tmp_path / name for name in ("ignore", "apply", "again")]
  convert(folders[0], path, split="train")
  done = convert(folders[1], path, split="train", exif_orientation="apply")
  assert done.image == {"encoding": "original", "exif_orientation": "apply"}
  assert convert(folders[2], str(folders[1]), split="train").image == done.image
  for folder, sizes in zip(
    folders, [[(40, 24), (24, 40)], *[[(24, 40)] * 2] * 2], strict=True
  ):
    for setting, size in zip(("ignore", "apply"), sizes, strict=True):
      source = load_source(
        "array_record",
        task="grounding",
        split="train",
        path=str(folder),
        exif_orientation=setting,
      )
      for copied in (source, pickle.loads(pickle.dumps(source))):
        assert images.original_size(copied[0].image) == size
  both = tuple(map(str, folders[:2]))
  message = r"some of the folders .*or convert them alike"
  with pytest.raises(UserError, match=message):
    load_source("array_record", task="", split="", path=both)


def test_pictures_for_people(tmp_path: pathlib.Path) -> None:
  """In predict, the page of predictions, and check_data."""
  paths = _write(tmp_path)
  expected = samples.smooth(24, 40)
  file = tmp_path / "phone.img"
  _same(read_picture(file, "apply"), expected)
  assert read_picture(file).shape == (24, 40, 3)
  source = load_source(
    "jsonl",
    task="grounding",
    split="train",
    path=paths["jsonl"],
    exif_orientation="apply",
  )
  prediction = {
    **{"task": "grounding", "prediction": BOX, "target": BOX, "kind": ""},
    **{"prompt": "one", "probability": 0.5, "correct": True},
  }
  panel = make_panel(prediction, source[0].image)
  _same(panel.image, expected)
  task = make_tasks()["grounding"]
  panel = check_samples._panel(source[0], task, (40, 24))
  _same(panel.image, expected)
  assert panel.target_box == BOX


def test_tfds(monkeypatch: pytest.MonkeyPatch) -> None:
  """Relative boxes refer to the upright picture."""
  from narvl_jax.data.sources.tfds import source as tfds

  made: list[Any] = []

  def remember(self: Any, **options: Any) -> None:
    self._options, self._box_format = options, "REL_XYXY"
    made.append(options)

  monkeypatch.setattr(tfds.TfdsSource, "__init__", remember)
  source: Any = tfds.TfdsSource(task="", split="", name="x")
  data = samples.encode(PIXELS, "JPEG", 6)
  assert source._box([0.5, 0.25, 1.0, 0.5], data) == (20.0, 6.0, 40.0, 12.0)
  source.exif_orientation = "apply"
  copied = pickle.loads(pickle.dumps(source))
  assert made == [{"task": "", "split": "", "name": "x"}] * 2
  assert copied._box([0.5, 0.25, 1.0, 0.5], data) == (12.0, 10.0, 24.0, 20.0)


def test_configs() -> None:
  config: Any = get_config("vqa")
  assert config.data.exif_orientation == "apply"
  config = default_config("vqa")
  config.data.exif_orientation = "aply"
  config.data.train.x = train_source("shapes", "vqa")
  config.data.evaluation.x = evaluation_source("shapes", "vqa")
  message = r'data.exif_orientation: "aply" is unknown. Did you mean "apply"'
  with pytest.raises(UserError, match=message):
    validate(config, fit=False)
