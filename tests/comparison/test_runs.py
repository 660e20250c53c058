"""Which runs and tasks may be compared."""

from types import SimpleNamespace
from typing import Any

import pytest

from narvl_jax.comparison import runs as runs_lib
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import ConfigDict


def _run(flag: str, **changes: Any) -> runs_lib.Run:
  """A run as far as the checks look at it."""
  data = {
    "image_size": (32, 32),
    "max_text_length": 40,
    "exif_orientation": "ignore",
    "evaluation": {
      "a": {"source": "shapes", "task": "vqa", "options": {}},
      "b": {"source": "shapes", "task": "caption", "options": {}},
    },
  }
  data |= changes
  experiment: Any = SimpleNamespace(
    vocabulary=SimpleNamespace(fingerprint=changes.get("words", "1" * 64)),
    config=ConfigDict({"data": data}),
  )
  return runs_lib.Run(flag, f"runs/{flag}", experiment, {}, 1)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"words": "2" * 64}, "different vocabularies, 111111111111 .*--nar, --ar"),
    ({"image_size": (64, 64)}, r"image_size is \[32, 32\].*\[64, 64\] in"),
    ({"max_text_length": 9}, "max_text_length is 40.* and 9 in runs/ar"),
    ({"exif_orientation": "apply"}, r"exif_orientation is ignore in .*apply"),
  ],
)
def test_runs_that_see_other_things(change: Any, message: str) -> None:
  with pytest.raises(UserError, match=message):
    runs_lib._check_same(_run("nar"), _run("ar", **change))
  runs_lib._check_same(_run("nar"), _run("ar"))


def test_tasks_that_both_have_on_the_same_data() -> None:
  pair = {"NAR": _run("nar"), "AR": _run("ar")}
  assert runs_lib.common_tasks(pair, []) == ["vqa", "caption"]
  assert runs_lib.common_tasks(pair, ["caption"]) == ["caption"]
  with pytest.raises(UserError, match=r'"captions".* Did you mean "caption"'):
    runs_lib.common_tasks(pair, ["captions"])
  other = {"a": {"source": "easy_vqa", "task": "vqa", "options": {}}}
  pair["AR"] = _run("ar", evaluation=other)
  with pytest.raises(UserError, match=r"vqa on different data.*--tasks"):
    runs_lib.common_tasks(pair, [])
  pair["NAR"] = _run(
    "nar", evaluation={"b": {"source": "shapes", "task": "caption"}}
  )
  with pytest.raises(UserError, match=r"no task: caption \(--nar\) and vqa"):
    runs_lib.common_tasks(pair, [])
