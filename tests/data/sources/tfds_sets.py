"""Small data sets that are built through tfds in published feature layouts."""

import io
import pathlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.features import feature as feature_lib

F = tfds.features
WIDTH, HEIGHT = 64, 48
# Sizes of the splits of coco_captions, in pictures.
COCO_SPLITS = {"train": 6, "val": 4, "restval": 2}


def jpeg(number: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
  out = io.BytesIO()
  rng = np.random.default_rng(number)
  pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
  Image.fromarray(pixels).save(out, "JPEG")
  return out.getvalue()


def coco_captions(number: int) -> list[tuple[int, str]]:
  """Captions of a picture: 1 to 3, the first in Latin letters beyond ASCII."""
  count = number % 3 + 1
  return [
    (100 * number + k, f"Caption {k} of {number} é") for k in range(count)
  ]


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  # Nothing is downloaded, so there are no checksums to look for.
  code_path: Any = None


class CocoCaptions(_Builder):
  """The layout of tfds coco_captions 1.1.0."""

  name = "coco_captions"
  VERSION = tfds.core.Version("1.1.0")
  BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="2014"),)

  def _info(self) -> tfds.core.DatasetInfo:
    objects = {
      "id": np.int64,
      "area": np.int64,
      "bbox": F.BBoxFeature(),
      "label": F.ClassLabel(num_classes=80),
      "is_crowd": np.bool_,
    }
    features = {
      "image": F.Image(encoding_format="jpeg"),
      "image/filename": F.Text(),
      "image/id": np.int64,
      "objects": F.Sequence(objects),
      "captions": F.Sequence({"text": np.str_, "id": np.int64}),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=F.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager: Any) -> Any:
    del dl_manager
    starts = {"train": 0, "val": 10, "restval": 20}
    return {
      split: self._generate_examples(range(starts[split], starts[split] + n))
      for split, n in COCO_SPLITS.items()
    }

  def _generate_examples(self, numbers: Any) -> Iterator[Any]:
    for number in numbers:
      yield (
        number,
        {
          "image": jpeg(number),
          "image/filename": f"{number}.jpg",
          "image/id": number,
          "objects": [],
          "captions": [{"id": i, "text": t} for i, t in coco_captions(number)],
        },
      )


def expressions(number: int) -> Iterator[tuple[int, str, tuple[int, ...]]]:
  """Yields (id, expression, box in pixels) of picture `number`."""
  for k in range(number % 3):
    box = (4 + k, 10 + 2 * k, 40 + k, 22 + 3 * k)
    for j in range((number + k) % 2 + 1):
      yield (
        1000 * number + 10 * k + j,
        f"object {k} phrase {j} of {number}",
        box,
      )


class RefCoco(_Builder):
  """The layout of tfds ref_coco 1.1.0."""

  name = "ref_coco"
  VERSION = tfds.core.Version("1.1.0")
  BUILDER_CONFIGS = (
    tfds.core.BuilderConfig(name="refcoco_unc"),
    tfds.core.BuilderConfig(name="refcocog_umd"),
  )

  def _info(self) -> tfds.core.DatasetInfo:
    annotation = {
      "id": np.int64,
      "area": np.int64,
      "bbox": F.BBoxFeature(),
      "label": np.int64,
    }
    expression = F.Sequence({"refexp_id": np.int64, "raw": F.Text()})
    referred = {
      **annotation,
      "gt_box_index": np.int64,
      "mask": F.Image(encoding_format="png"),
      "refexp": expression,
    }
    features = {
      "image": F.Image(encoding_format="jpeg"),
      "image/id": np.int64,
      "objects": F.Sequence(referred),
      "coco_annotations": F.Sequence(annotation),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=F.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager: Any) -> Any:
    del dl_manager
    return {
      "train": self._generate_examples(range(7)),
      "testA": self._generate_examples(range(7, 10)),
    }

  def _generate_examples(self, numbers: range) -> Iterator[Any]:
    for number in numbers:
      objects: dict[tuple[int, ...], list[dict[str, Any]]] = {}
      for key, phrase, box in expressions(number):
        objects.setdefault(box, []).append({"refexp_id": key, "raw": phrase})
      mask = io.BytesIO()
      Image.fromarray(np.zeros((HEIGHT, WIDTH), bool)).save(mask, "PNG")
      yield (
        number,
        {
          "image": jpeg(number),
          "image/id": number,
          "coco_annotations": [],
          "objects": [
            {
              "id": k,
              "area": 1,
              "bbox": _bbox(box),
              "label": 1,
              "gt_box_index": 0,
              "mask": mask.getvalue(),
              "refexp": phrases,
            }
            for k, (box, phrases) in enumerate(objects.items())
          ],
        },
      )


def _bbox(box: tuple[int, ...]) -> Any:
  x0, y0, x1, y1 = box
  return F.BBox(
    ymin=y0 / HEIGHT, xmin=x0 / WIDTH, ymax=y1 / HEIGHT, xmax=x1 / WIDTH
  )


class MyData(_Builder):
  """A data set of no known layout, with one of every kind of feature."""

  name = "my_data"
  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      "photo": F.Image(encoding_format="png"),
      "question": F.Text(),
      "answers": F.Sequence(F.Text()),
      "confidences": F.Sequence(np.float32),
      "weights": F.Tensor(shape=(None,), dtype=np.float32),
      "best": F.ClassLabel(names=["cat", "dog"]),
      "verdict": F.ClassLabel(names=["entailment", "neutral", "contradiction"]),
      "code": np.int64,
      "caption": F.Text(),
      "things": F.Sequence(F.ClassLabel(names=["tree", "car"])),
      "place": F.BBoxFeature(),
      "xywh": F.Tensor(shape=(4,), dtype=np.float32),
      "packed": F.Tensor(shape=(2,), dtype=np.float32, encoding="zlib"),
      "meta": {"kind": F.Text(), "name": F.Text()},
    }
    return tfds.core.DatasetInfo(
      builder=self, features=F.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager: Any) -> Any:
    del dl_manager
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[Any]:
    for number in range(3):
      out = io.BytesIO()
      Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(out, "PNG")
      yield (
        number,
        {
          "photo": out.getvalue(),
          "question": f"what is {number}?",
          "answers": ["cat", "cat", "dog"],
          "confidences": [0.5, 1.0, 0.25],
          "weights": np.array([0.5, 0.125, 0.25], np.float32),
          "best": "dog",
          "verdict": ["entailment", "neutral", "contradiction"][number],
          "code": number,
          "caption": "a premise",
          "things": ["tree", "car", "tree"],
          "place": _bbox((4, 10, 40, 22)),
          "xywh": np.array([4, 10, 36, 12], np.float32),
          "packed": np.zeros(2, np.float32),
          "meta": {"kind": "animals", "name": f"name{number}"},
        },
      )


def build(folder: pathlib.Path) -> None:
  """Prepares all of them in a folder, without TensorFlow."""
  # tfds asks for TensorFlow's type when it writes nested sequences; the NumPy
  # type, which it wants next, does as well.
  dtype = property(lambda info: info.np_dtype)
  with mock.patch.object(feature_lib.TensorInfo, "dtype", dtype):
    for builder, config in (
      (CocoCaptions, "2014"),
      (RefCoco, "refcoco_unc"),
      (MyData, None),
    ):
      builder(
        data_dir=str(folder), config=config, file_format="array_record"
      ).download_and_prepare()
