"""Features of a TFDS example, selected by path; pictures stay encoded.

A path names features as TFDS nests them, such as "objects/bbox". A feature's
own name may contain "/" ("image/id").

`tfds.decode.PartialDecoding` would do this, but it imports TensorFlow and is
not supported by `as_data_source`. So TFDS only parses the example here, which
decodes no picture.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_parser

from narvl_jax.errors import UserError, did_you_mean

_MAX_SEQUENCES = 2


@dataclasses.dataclass(frozen=True)
class Selector:
  """Selects the values of records from one feature of an example.

  Attributes:
    path: path of the feature, such as "objects/bbox".
    depth: number of sequences around the feature, 0 to 2.
    each_depth: number of sequences whose elements are the records, 0 to 2.
    common: how many of these sequences also surround the feature.
    names: names of a class label's values; () for other features.
    box_format: format of a BBoxFeature, such as "REL_YXYX"; "" for others.
  """

  path: str
  depth: int
  each_depth: int
  common: int
  names: tuple[str, ...] = ()
  box_format: str = ""

  @property
  def is_element(self) -> bool:
    """Whether each record has a value of its own."""
    return 0 < self.each_depth == self.common

  def lengths(self, example: Mapping[str, Any]) -> list[int]:
    """Returns the records of each outer element; their sum is the count."""
    value = self._value(example)
    return [len(value)] if self.each_depth < 2 else [len(row) for row in value]

  def place(self, example: Mapping[str, Any], element: int) -> list[int]:
    """Returns the indices of record `element` in the sequences of records."""
    if self.each_depth < 2:
      return [element]
    for row, length in enumerate(self.lengths(example)):
      if element < length:
        return [row, element]
      element -= length
    raise UserError("the lengths of nested features do not fit together")

  def select(self, example: Mapping[str, Any], place: Sequence[int]) -> Any:
    """Returns the value or list of values of one record; None if absent.

    Args:
      example: output of `Parser`.
      place: indices into the sequences whose elements are the records.

    Raises:
      UserError: the feature has fewer elements than others.
    """
    value = self._value(example)
    for index in place[: self.common]:
      if index >= len(value):
        raise UserError(
          f'the feature "{self.path}" has {len(value)} values, not the'
          f" {index + 1} that other features have"
        )
      value = value[index]
    value = _plain(value)
    if not self.names or value is None:
      return value
    if isinstance(value, list):
      return [self._name(item) for item in value]
    return self._name(value)

  def _value(self, example: Mapping[str, Any]) -> Any:
    value = example[self.path]
    return [] if value is None and self.depth else value

  def _name(self, value: int) -> str:
    # TFDS writes -1 for an unknown label.
    return self.names[value] if 0 <= value < len(self.names) else ""


def _plain(value: Any) -> Any:
  """Returns Python values; the rows of a ragged feature are concatenated."""
  if isinstance(value, list):
    return [item for row in value for item in _plain(row)]
  return value.tolist() if isinstance(value, np.ndarray) else value


def make_parser(features: Any, selectors: Sequence[Selector]) -> Any:
  """Returns a parser: serialized example -> {path: value} of the selectors.

  Values are NumPy arrays, scalars or, of nested sequences, lists of arrays. A
  feature that the example lacks is None.
  """
  paths = {selector.path for selector in selectors}
  infos = _flatten(features.get_serialized_info())
  # The parser raises KeyError for a ragged feature that it does not know.
  parser = example_parser.ExampleParserNp(
    {
      path: info
      for path, info in infos
      if path in paths or info.shape.count(None) > 1
    }
  )
  return parser.parse_example


def _flatten(infos: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, info in infos.items():
    if isinstance(info, Mapping):
      yield from _flatten(info, f"{prefix}{name}/")
    else:
      yield prefix + name, info


def make_selector(
  features: Any, path: str, each: str, *, field: str
) -> Selector:
  """Returns the selector of the feature at a path.

  Args:
    features: `tfds.features.FeaturesDict` of a data set.
    each: path of the sequence whose elements are the records, or "".

  Raises:
    UserError: there is no such feature or sequence, or its type cannot be
      read.
  """
  nodes = list(_nodes(features))
  sequences = [
    (name, depth)
    for name, node, depth in nodes
    if isinstance(node, tfds.features.Sequence)
  ]
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
      f'tfds: "{each}" is in {each_depth} sequences; options.each may be in'
      f" at most {_MAX_SEQUENCES}"
    )
  leaves = {
    name: (node, depth)
    for name, node, depth in nodes
    if not isinstance(node, tfds.features.FeaturesDict | tfds.features.Sequence)
  }
  if path not in leaves:
    raise UserError(
      f'tfds: there is no feature "{path}" for fields.{field}.'
      f"{did_you_mean(path, leaves)} Set options.fields.{field}"
    )
  leaf, depth = leaves[path]
  common = [
    depth
    for name, depth in sequences
    if _is_within(each, name) and _is_within(path, name)
  ]
  box_format = getattr(leaf, "bbox_format", None)
  return Selector(
    path,
    _checked_depth(path, leaf, depth, field),
    each_depth,
    max(common, default=0),
    tuple(leaf.names) if isinstance(leaf, tfds.features.ClassLabel) else (),
    box_format.value if box_format is not None else "",
  )


def _nodes(
  feature: Any, path: str = "", depth: int = 0
) -> Iterator[tuple[str, Any, int]]:
  """Yields (path, feature, sequences around or at it) of all features."""
  if isinstance(feature, tfds.features.FeaturesDict):
    for name, inner in feature.items():
      yield from _nodes(inner, f"{path}/{name}".lstrip("/"), depth)
  elif isinstance(feature, tfds.features.Sequence):
    yield path, feature, depth + 1
    yield from _nodes(feature.feature, path, depth + 1)
  else:
    yield path, feature, depth


def _checked_depth(path: str, leaf: Any, depth: int, field: str) -> int:
  """Returns the number of sequences around a leaf, if it can be read."""
  shape = tuple(leaf.shape)
  is_image = isinstance(leaf, tfds.features.Image)
  # A one-dimensional tensor of unknown length is a list as well.
  is_list = shape == (None,) and not is_image
  unknown_size = None in shape and not is_image and not is_list
  encoded = getattr(leaf, "_encoded_to_bytes", False)
  if depth + is_list > _MAX_SEQUENCES or encoded or unknown_size:
    raise UserError(
      f'tfds: the feature "{path}" ({type(leaf).__name__}, shape {leaf.shape},'
      f" in {depth + is_list} sequences) cannot be read; set"
      f" options.fields.{field} to a text, number, label, box or picture in at"
      " most two sequences"
    )
  return depth + is_list


def _is_within(path: str, outer: str) -> bool:
  return path == outer or path.startswith(outer + "/")


def text(value: Any) -> str:
  """Returns a text; of a list, its only element.

  Raises:
    UserError: there are several, or one is not in UTF-8.
  """
  found = texts(value)
  if len(found) > 1:
    raise UserError(f"there are {len(found)} texts in place of one: {found}")
  return found[0] if found else ""


def texts(value: Any) -> list[str]:
  """Returns the texts of a value or of a list of values.

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
