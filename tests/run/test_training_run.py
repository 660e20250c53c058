"""The work of one start of a run."""

import collections
from typing import Any

import pytest

from narvl_jax.data.batches.mixture import Mixture
from narvl_jax.errors import UserError
from narvl_jax.experiment import config_checks, datasets
from narvl_jax.hosts import distributed
from narvl_jax.run import training_run
from narvl_jax.warm_start import init_from
from tests.support.tiny import tiny_config


def _config(**train: Any) -> Any:
  config = tiny_config()
  config.train.update({"steps": 2, "eval_every": 1, **train})
  config.optimizer.warmup_steps = 0
  config.evaluation.max_examples = 8
  return config


def test_everything_happens_once(tmp_path, monkeypatch):
  training_run.train(_config(), tmp_path / "first")
  counts: collections.Counter[Any] = collections.Counter()

  def count(owner: Any, name: str, key: Any = None) -> None:
    function = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
      counts[key(*args, **kwargs) if key else name] += 1
      return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)

  count(config_checks, "_check_keys", lambda config, schema, prefix="": prefix)
  count(config_checks, "check_fit")
  count(Mixture, "__init__")
  count(init_from, "_plan")
  count(
    datasets,
    "load_source",
    lambda name, *, task, split, **options: (name, task, split),
  )
  config = _config()
  config.init_from = str(tmp_path / "first")
  training_run.train(config, tmp_path / "second")
  # The whole config, and each section of it.
  assert counts[""] == 1
  opened = {key for key in counts if isinstance(key, tuple)}
  # Two evaluations during training and one at the end read the same sources.
  assert opened == {
    ("shapes", task, split)
    for task in ("vqa", "grounding")
    for split in ("train", "validation", "test")
  }
  assert set(counts.values()) == {1}, counts


def test_hosts_must_count_the_same_examples(tmp_path, monkeypatch):
  config = _config(epoch_examples=1)
  monkeypatch.setattr(distributed, "gather_json", lambda own: [own, own + 1])
  with pytest.raises(
    UserError,
    match=r"hosts count different numbers of examples in data.train: \d+, \d+;"
    r" give all hosts the same files \(--config.data.train\)",
  ):
    training_run.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
