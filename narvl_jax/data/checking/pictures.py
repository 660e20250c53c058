"""The part of `narvl_jax.check_data`'s report about pictures."""

from collections.abc import Mapping
from typing import Any

from narvl_jax.terminal.text import escape

_FLAG = "--config.data.exif_orientation"
# Setting -> how a picture with a tag is read.
_DONE = {"ignore": "read as stored", "apply": "turned upright"}
_FITS = {"ignore": "as stored", "apply": "turned upright"}
_OTHER = {"ignore": "apply", "apply": "ignore"}
_WARNINGS = {
  "one_color": (
    "end as one colour, so that the model sees nothing in them (empty, damaged"
    " when they were saved, or values on another scale)"
  ),
  "hidden": (
    "have an outline that only their transparency shows, and transparency is"
    " dropped: put them on a background before"
  ),
}


def picture_lines(figures: Mapping[str, Any]) -> list[str]:
  """Returns the lines about sizes, orientation tags, warnings and boxes."""
  lines = []
  for name, unit in (("width", "pixels"), ("height", "pixels"), ("bytes", "")):
    spread = figures["pictures"][name]
    if spread:
      lines.append(
        f"picture {name:<6} min {spread['min']:,.0f}, median"
        f" {spread['median']:,.0f}, max {spread['max']:,.0f} {unit}".rstrip()
      )
  lines += _orientation_lines(figures)
  lines += [f"warning        {text}" for text in picture_warnings(figures)]
  area = figures["box_area"]
  if area:
    lines += [
      "boxes          x0, y0, x1, y1 in pixels of the original picture, from"
      " its left upper corner",
      f"box area       min {area['min']:.2%}, median {area['median']:.2%}, max"
      f" {area['max']:.2%} of the picture",
    ]
  return lines


def _orientation_lines(figures: Mapping[str, Any]) -> list[str]:
  found = figures["pictures"]["orientation"]
  if not found["tagged"]:
    return []
  setting = figures["limits"]["exif_orientation"]
  return [
    f"EXIF           {found['tagged']:,} of {found['of']:,} pictures have an"
    f" orientation tag; data.exif_orientation={setting}: they are"
    f" {_DONE[setting]}"
  ]


def picture_warnings(
  figures: Mapping[str, Any], spared: float = 0.0
) -> list[str]:
  """Returns sentences about pictures without visible content.

  Args:
    figures: output of `inspection.inspect`.
    spared: largest fraction of such pictures without a sentence.
  """
  pictures = figures["pictures"]
  total = pictures["examined"]
  return [
    f"{found['count']:,} of {total:,} pictures, such as"
    f" {escape(found['example'])}, {text}"
    for key, text in _WARNINGS.items()
    if (found := pictures[key])["count"] > spared * total
  ]


def orientation_flags(
  figures: Mapping[str, Any], reasons: list[str], spared: float
) -> tuple[list[str], int]:
  """Returns the flag that turns pictures as their annotators saw them.

  Viewers apply the tag, so the flag recommends it unless boxes contradict.

  Args:
    figures: output of `inspection.inspect`.
    reasons: a sentence about the flag is appended.
    spared: largest fraction of pictures with a tag that needs no flag.

  Returns:
    The flag, if another setting is better, and the bad records that it fixes.
  """
  found = figures["pictures"]["orientation"]
  if found["tagged"] <= spared * found["of"]:
    return [], 0
  setting = figures["limits"]["exif_orientation"]
  other = _OTHER[setting]
  fit, fit_other = found["fit_only_this"], found["fit_only_other"]
  reason = (
    f"{found['tagged']:,} of {found['of']:,} pictures have an EXIF orientation,"
    f" and data.exif_orientation={setting} has them {_DONE[setting]}"
  )
  if fit_other > fit:
    reason += f"; {fit_other:,} boxes fit only pictures {_FITS[other]}"
  elif fit:
    reason += f"; {fit:,} boxes fit only these, so that it is right"
  elif setting == "ignore":
    reason += ", not as people see them"
  if fit_other > fit or (setting == "ignore" and not fit):
    reasons.append(reason)
    return [f"{_FLAG}={other}"], found["bad_other"]
  if setting == "ignore":
    reasons.append(reason)
  return [], 0
