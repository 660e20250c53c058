"""Known layouts of TFDS data sets, and checks of the options."""

from collections.abc import Mapping

from narvl_jax.data.sources.tfds.fields import Selector
from narvl_jax.errors import UserError, did_you_mean

FIELDS = (
  "image",
  "prompt",
  "target",
  "box",
  "score",
  "id",
  "premise",
  "objects",
  "kind",
)
_NEEDED = {
  "caption": ("image", "target"),
  "vqa": ("image", "prompt", "target"),
  "grounding": ("image", "prompt", "box"),
  "entailment": ("image", "prompt", "target"),
}
# Order of the coordinates as TFDS names it; REL_: fractions of the picture.
BOX_FORMATS = ("REL_YXYX", "YXYX", "REL_XYXY", "XYXY", "XYWH")
# Splits that the reference trains on, with one row for each caption.
_TRAIN_SPLITS = ("train", "restval")


def layout(
  name: str, split: str, each: str | None
) -> tuple[dict[str, str], str]:
  """Returns fields and `each` of a known data set."""
  if name == "coco_captions":
    if each is None:
      parts = [part.split("[")[0].strip() for part in split.split("+")]
      train = all(part in _TRAIN_SPLITS for part in parts)
      each = "captions" if train else ""
    name_of = "captions/id" if each == "captions" else "image/id"
    return {"image": "image", "id": name_of, "target": "captions/text"}, each
  if name == "ref_coco":
    return {
      "image": "image",
      "id": "objects/refexp/refexp_id",
      "prompt": "objects/refexp/raw",
      "box": "objects/bbox",
    }, "objects/refexp" if each is None else each
  return {}, each or ""


def needed_fields(task: str, mapping: Mapping[str, str]) -> dict[str, str]:
  """Returns the part of a mapping that a task uses."""
  return {
    field: path
    for field, path in mapping.items()
    if field == "id" or field in _NEEDED[task]
  }


def check_fields(name: str, task: str, mapping: Mapping[str, str]) -> None:
  """Raises `UserError` for a field that is unknown or missing."""
  for field in mapping:
    if field not in FIELDS:
      raise UserError(
        f'tfds: options.fields has the unknown field "{field}".'
        f"{did_you_mean(field, FIELDS)}"
      )
  missing = [field for field in _NEEDED[task] if field not in mapping]
  if missing:
    raise UserError(
      f"tfds: {name} needs a feature for the field {', '.join(missing)} of the"
      f" task {task}; set options.fields.{missing[0]}=FEATURE"
    )


def counter(selectors: Mapping[str, Selector], each: str) -> Selector | None:
  """Returns the selector whose elements are the records; None without `each`.

  Raises:
    UserError: no field is in the sequence.
  """
  if not each:
    return None
  found = max(selectors.values(), key=lambda selector: selector.common)
  if not found.is_element:
    raise UserError(
      f'tfds: no field is in options.each="{each}"; set options.each or'
      " options.fields"
    )
  return found


def box_format_of(box: Selector | None, given: str) -> str:
  """Returns the format of the box; "" if there is none.

  Raises:
    UserError: neither the option nor the feature states it.
  """
  if given and given not in BOX_FORMATS:
    raise UserError(
      f'tfds: options.box_format is "{given}".'
      f"{did_you_mean(given, BOX_FORMATS)}"
    )
  found = given or (box.box_format if box else "")
  if box is not None and not found:
    raise UserError(
      f'tfds: the feature "{box.path}" does not state the format of its box;'
      f" set options.box_format to one of {', '.join(BOX_FORMATS)} (REL_: as"
      " shares of the picture, others in pixels)"
    )
  return found
