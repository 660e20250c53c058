"""How data sets of TFDS give records: known layouts and checks of options."""

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
# Order of a box's numbers, as TFDS names them; REL_: shares of the picture.
BOX_FORMATS = ("REL_YXYX", "YXYX", "REL_XYXY", "XYXY", "XYWH")
# Splits that the reference trains on, one row a caption.
_TRAIN_SPLITS = ("train", "restval")


def layout(
  name: str, split: str, each: str | None
) -> tuple[dict[str, str], str]:
  """Returns the fields of a known data set, and what `each` is."""
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
  """Returns the part of a known data set's mapping that a task uses."""
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
  """Returns the selector that tells how many records an example has.

  Raises:
    UserError: no field lies in the sequence.
  """
  if not each:
    return None
  found = max(selectors.values(), key=lambda selector: selector.common)
  if not found.is_element:
    raise UserError(
      f'tfds: no field lies in options.each="{each}"; set options.each or'
      " options.fields"
    )
  return found


def box_format_of(box: Selector | None, given: str) -> str:
  """Returns how a box is given; "" if there is none.

  Raises:
    UserError: neither the option nor the feature says it.
  """
  if given and given not in BOX_FORMATS:
    raise UserError(
      f'tfds: options.box_format is "{given}".'
      f"{did_you_mean(given, BOX_FORMATS)}"
    )
  found = given or (box.box_format if box else "")
  if box is not None and not found:
    raise UserError(
      f'tfds: the feature "{box.path}" does not say how it gives a box;'
      f" set options.box_format to one of {', '.join(BOX_FORMATS)} (REL_: as"
      " shares of the picture, others in pixels)"
    )
  return found
