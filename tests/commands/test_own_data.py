"""configs/own_data.py: one flag names all files; they train what they hold."""

import json
import pathlib
from typing import Any

import pytest

from narvl_jax.configs.own_data import get_config
from narvl_jax.data.example import TASKS
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import from_json, to_json
from narvl_jax.experiment.config_checks import validate
from narvl_jax.experiment.create import create
from narvl_jax.experiment.datasets import DataSets, load_mixture
from narvl_jax.run import data_checks as run_data
from tests.data.sources import tsv_files

TARGETS = {
  "caption": "a dog under a tree",
  "vqa": {"two": 1.0, "2": 0.3},
  "grounding": [1, 2, 9, 10],
  "entailment": "neutral",
}


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
  """Files of three splits; every task has the same rows."""
  (tmp_path / "1.jpg").write_bytes(tsv_files.picture(1))
  for split in ("train", "validation", "test"):
    rows = [
      {"image": "1.jpg", "task": task, "prompt": split, "target": target}
      for task, target in TARGETS.items()
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows * 5)
    (tmp_path / f"own_{split}.jsonl").write_text(lines)
  return str(tmp_path / "own_{split}.jsonl")


@pytest.mark.parametrize("arg", [*TASKS, "vqa+caption", "+".join(TASKS)])
def test_builds(path: str, arg: str) -> None:
  config: Any = get_config(arg)
  names = list(config.data.train)
  tasks = sorted(arg.split("+"))
  assert names == list(config.data.evaluation)
  assert names == (["own"] if len(tasks) == 1 else [f"own_{t}" for t in tasks])
  # Set once, as by a flag.
  config.data.train[names[-1]].options.path = path
  config = from_json(to_json(config))
  validate(config)
  experiment = create(config)
  mixture = load_mixture(config)
  assert [len(source) for source, *_ in mixture] == [5] * len(tasks)
  assert run_data.check_targets(experiment, mixture) == []
  run_data.check_evaluation(DataSets(config))


def test_mistakes() -> None:
  with pytest.raises(UserError, match=r'no task "vqaa"\. Did you mean "vqa"'):
    get_config("caption+vqaa")
  config: Any = get_config()
  assert list(config.tasks) == ["vqa"]
  with pytest.raises(
    UserError, match=r"jsonl: options.path is None; .*options.path=FILE"
  ):
    create(config)
