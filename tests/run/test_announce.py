"""Lines of a run about its data and about tasks without training so far."""

from types import SimpleNamespace
from typing import Any

import pytest

from narvl_jax.experiment.config import evaluation_source
from narvl_jax.experiment.datasets import DataSets, load_mixture
from narvl_jax.experiment.experiment import relative_evaluation
from narvl_jax.run import training_run
from narvl_jax.run.announce import describe_source, used_table
from narvl_jax.run.data_checks import make_mixture, untrained_tasks
from narvl_jax.run.run import Run
from tests.support.tiny import tiny_config


class _Endless(list):
  endless = True


def test_a_source_is_described_by_the_part_in_use():
  assert describe_source([None] * 2000, "vqa", "easy", 5000, 20) == (
    "source easy for vqa: 2,000 examples; 20 steps use 5,000, 2.50 epochs"
  )
  assert describe_source([None], "vqa", "one", 4000, 9).endswith(
    "1 example; 9 steps use 4,000, 4,000 epochs"
  )
  assert describe_source(_Endless(), "vqa", "drawn", 1280, 20) == (
    "source drawn for vqa: endless; 20 steps use 1,280"
  )


def test_only_training_scenes_are_endless():
  config = tiny_config()
  config.data.train.vqa.split = "validation"
  found = {
    name: getattr(source, "endless", False)
    for source, _, _, name in load_mixture(config)
  }
  assert found == {"vqa": False, "grounding": True}


def test_table_of_what_was_used():
  mixture: Any = [
    (_Endless(), "vqa", 1.0, "drawn"),
    ([None], "caption", 1.0, "a\x1b[31m"),
  ]
  counters = {}
  for name, values in (
    ("drawn", (128_000, 0.0001, 0)),
    ("a\x1b[31m", (51_200, 0.123, 7)),
  ):
    for key, value in zip(("examples", "epochs", "bad"), values, strict=True):
      counters[f"{name}/{key}"] = float(value)
  assert used_table(mixture, counters).splitlines() == [
    "source     task     examples   epochs  bad records",
    "--------------------------------------------------",
    "drawn      vqa       128,000  endless            0",
    r"a\x1b[31m  caption    51,200     0.12            7",
  ]


def test_tasks_without_an_example_are_marked(monkeypatch, capsys):
  """Those that come later, not those that are only evaluated."""
  config = tiny_config()
  config.data.train.vqa.weight = ((0, 0.0), (4, 1.0))
  config.evaluation.best_metric = "mean"
  experiment: Any = SimpleNamespace(config=config)
  mixture = make_mixture(config, load_mixture(config))
  assert untrained_tasks(mixture, 4) == ["vqa"]
  assert untrained_tasks(mixture, 5) == []

  report = {
    "split": "validation",
    "tasks": {
      "vqa": {"accuracy": 0.04},
      "grounding": {"acc@0.5": 0.5, "mean_iou": 0.25},
      "entailment": {"accuracy": 0.25},
    },
    "counts": {"vqa": 50, "grounding": 50, "entailment": 50},
    "kinds": {},
  }
  monkeypatch.setattr(
    training_run, "evaluate_tasks", lambda *a, **k: (report, [])
  )
  monkeypatch.setattr(training_run, "evaluation_variables", lambda state: {})
  nothing: Any = None
  setup: Any = SimpleNamespace(experiment=experiment)
  run = Run(setup, mixture, nothing, nothing, nothing, say=print)
  metrics, score = training_run._validate(run, lambda: None, nothing, 4)
  assert capsys.readouterr().out.splitlines() == [
    "step 4 on validation:",
    "task        examples  accuracy  acc@0.5  mean_iou",
    "-------------------------------------------------",
    "vqa               50     4.0 %  (not trained yet)",
    "grounding         50             50.0 %    25.0 %",
    "entailment        50    25.0 %",
  ]
  # They are written, and count for the best checkpoint, as any other.
  assert metrics["validation/vqa/accuracy"] == 0.04
  assert score == pytest.approx((0.04 + 0.5 + 0.25) / 3)
  training_run._validate(run, lambda: None, nothing, 5)
  assert "not trained" not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("every", "limit", "ratio"), [(0, 0, 0), (5, 0, 80), (5, 100, 2)]
)
def test_size_of_the_final_evaluation(every, limit, ratio):
  config = tiny_config()
  config.train.update({"eval_every": every, "eval_examples": 50})
  config.evaluation.max_examples = limit
  config.data.evaluation.other = evaluation_source("shapes", "vqa")
  # 4000 scenes each.
  data = DataSets(config)
  experiment: Any = SimpleNamespace(config=config, dataset=data.evaluation)
  assert relative_evaluation(experiment) == ratio
