"""Features of a TFDS example by path, read from its protocol buffer.

Only what is asked for is read: pictures stay encoded, masks untouched. A path
names features as TFDS nests them, such as "objects/bbox". Feature names may
hold a "/" themselves ("image/id").
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from narvl_jax.errors import UserError, did_you_mean

_FLAT = "ragged_flat_values"
_LENGTHS = "ragged_row_lengths_0"
_MAX_SEQUENCES = 2


@dataclasses.dataclass(frozen=True)
class Feature:
  """A feature at the end of a path.

  Attributes:
    path: such as "objects/bbox".
    depth: number of sequences that it is within, 0 to 2.
    size: number of values of one item, 4 for a box; 1 for a scalar.
    names: of a class label's values; () for other features.
    box_format: of a BBoxFeature, such as "REL_YXYX"; else "".
    is_image: whether it is a picture.
  """

  path: str
  depth: int
  size: int
  names: tuple[str, ...] = ()
  box_format: str = ""
  is_image: bool = False

  def values(self, example: Any) -> list[Any]:
    """Returns all items of an example, those of nested sequences in a row.

    Args:
      example: `tf_example_pb2.Example`.
    """
    key = f"{self.path}/{_FLAT}" if self.depth > 1 else self.path
    if key not in example.features.feature:
      return []
    feature = example.features.feature[key]
    kind = feature.WhichOneof("kind")
    flat = list(getattr(feature, kind).value) if kind else []
    if self.names:
      flat = [self._name(value) for value in flat]
    if self.size == 1:
      return flat
    return [flat[i : i + self.size] for i in range(0, len(flat), self.size)]

  def row_lengths(self, example: Any) -> list[int]:
    """Returns the number of items in each inner sequence, at depth 2."""
    key = f"{self.path}/{_LENGTHS}"
    if key not in example.features.feature:
      return []
    return list(example.features.feature[key].int64_list.value)

  def _name(self, value: int) -> str:
    # TFDS writes -1 for a label that is not known.
    return self.names[value] if 0 <= value < len(self.names) else ""


def find_feature(features: Any, path: str, *, field: str) -> Feature:
  """Returns the feature at a path.

  Args:
    features: `tfds.features.FeaturesDict` of a data set.
    path: such as "objects/bbox".
    field: of ours, for messages.

  Raises:
    UserError: there is no such feature or its type cannot be read.
  """
  known = dict(all_features(features))
  if path not in known:
    raise UserError(
      f'tfds: there is no feature "{path}" for fields.{field}.'
      f"{did_you_mean(path, known)} Set options.fields.{field}"
    )
  leaf, depth = known[path]
  shape = tuple(leaf.shape)
  is_image = isinstance(leaf, tfds.features.Image)
  # A one-dimensional tensor of unknown length is a list as well.
  if len(shape) == 1 and shape[0] is None and not is_image:
    depth, shape = depth + 1, ()
  encoded = getattr(leaf, "_encoded_to_bytes", False)
  unknown_size = None in shape and not is_image
  if depth > _MAX_SEQUENCES or encoded or unknown_size:
    raise UserError(
      f'tfds: the feature "{path}" ({type(leaf).__name__}, shape {leaf.shape},'
      f" in {depth} sequences) cannot be read; set options.fields.{field} to a"
      " text, number, label, box or picture in at most two sequences"
    )
  box_format = getattr(leaf, "bbox_format", None)
  return Feature(
    path,
    depth,
    1 if is_image else math.prod(shape),
    tuple(leaf.names) if isinstance(leaf, tfds.features.ClassLabel) else (),
    box_format.value if box_format is not None else "",
    is_image,
  )


def all_features(
  features: Any, prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, tuple[Any, int]]]:
  """Yields (path, (feature, number of sequences around it)) of all leaves."""
  if isinstance(features, tfds.features.FeaturesDict):
    for name, inner in features.items():
      yield from all_features(inner, f"{prefix}{name}/", depth)
  elif isinstance(features, tfds.features.Sequence):
    yield from all_features(features.feature, prefix, depth + 1)
  else:
    yield prefix.removesuffix("/"), (features, depth)


@dataclasses.dataclass(frozen=True)
class Selector:
  """What a record takes of a feature.

  Attributes:
    feature: the feature.
    each_depth: number of sequences whose elements are the records, 0 to 2.
    common: how many of these the feature is within.
  """

  feature: Feature
  each_depth: int
  common: int

  @property
  def is_element(self) -> bool:
    """Whether each record has a value of its own."""
    return self.each_depth > 0 and self.common == self.each_depth

  def count(self, example: Any) -> int:
    """Returns how many records an example has, if `is_element`."""
    if self.feature.depth > self.each_depth:
      return len(self.feature.row_lengths(example))
    return len(self.feature.values(example))

  def row_lengths(self, example: Any) -> list[int]:
    """Returns how many records each outer element has; [] if they are it."""
    if self.each_depth < 2:
      return []
    return self.feature.row_lengths(example)

  def select(self, example: Any, element: int, lengths: list[int]) -> Any:
    """Returns the value of a record: an item, or a list of them.

    Args:
      example: `tf_example_pb2.Example`.
      element: which record of the example.
      lengths: from the `row_lengths` of the field that counts records.

    Returns:
      None if the example lacks the value.
    """
    items = self.feature.values(example)
    if self.common == 0:
      if self.feature.depth:
        return items
      return items[0] if items else None
    if self.common == 1:
      outer = _row_of(element, lengths) if self.each_depth == 2 else element
      if self.feature.depth == 2:
        own = self.feature.row_lengths(example)
        start = sum(own[:outer])
        return items[start : start + own[outer]]
      return self._item(items, outer)
    return self._item(items, element)

  def _item(self, items: list[Any], index: int) -> Any:
    if index >= len(items):
      raise UserError(
        f'the feature "{self.feature.path}" has {len(items)} values, not the'
        f" {index + 1} that other features have"
      )
    return items[index]


def make_selector(
  features: Any, path: str, each: str, *, field: str
) -> Selector:
  """Returns what records take of the feature at a path.

  Args:
    features: of the data set.
    path: of the feature.
    each: path of the sequence whose elements are the records, or "".
    field: of ours, for messages.

  Raises:
    UserError: there is no such feature or sequence.
  """
  sequences = list(_sequences(features))
  depths = [depth for name, depth in sequences if name == each]
  if each and not depths:
    names = {name for name, _ in sequences}
    hint = did_you_mean(each, names) if names else " There is none."
    raise UserError(
      f'tfds: there is no sequence "{each}".{hint} Set options.each'
    )
  each_depth = max(depths, default=0)
  if each_depth > _MAX_SEQUENCES:
    raise UserError(
      f'tfds: "{each}" lies in {each_depth} sequences; options.each may be in'
      f" at most {_MAX_SEQUENCES}"
    )
  common = [
    depth
    for name, depth in sequences
    if _is_within(each, name) and _is_within(path, name)
  ]
  return Selector(
    find_feature(features, path, field=field),
    each_depth,
    max(common, default=0),
  )


def _is_within(path: str, outer: str) -> bool:
  return path == outer or path.startswith(outer + "/")


def _row_of(element: int, lengths: list[int]) -> int:
  for row, length in enumerate(lengths):
    if element < length:
      return row
    element -= length
  raise UserError("the lengths of nested features do not fit together")


def _sequences(
  features: Any, prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, int]]:
  """Yields (path, number of sequences up to its own) of all sequences."""
  if isinstance(features, tfds.features.FeaturesDict):
    for name, inner in features.items():
      yield from _sequences(inner, f"{prefix}{name}/", depth)
  elif isinstance(features, tfds.features.Sequence):
    yield prefix.removesuffix("/"), depth + 1
    yield from _sequences(features.feature, prefix, depth + 1)


def text(value: Any) -> str:
  """Returns a text; of a list, its only element.

  Raises:
    UserError: there are several, or it is not in UTF-8.
  """
  if value is None:
    return ""
  found = texts(value)
  if len(found) > 1:
    raise UserError(f"there are {len(found)} texts in place of one: {found}")
  return found[0] if found else ""


def texts(value: Any) -> list[str]:
  """Returns the texts of a value or a list of values.

  Raises:
    UserError: one is not in UTF-8.
  """
  items = value if isinstance(value, list) else [value]
  try:
    return [
      item.decode("utf-8") if isinstance(item, bytes) else str(item)
      for item in items
      if item is not None
    ]
  except UnicodeDecodeError as e:
    raise UserError(f"a text is not in UTF-8: {e}") from e


def short(value: Any) -> str:
  """Returns what stands for a value in a message."""
  shown = repr(value)
  return shown if len(shown) <= 60 else shown[:57] + "..."
