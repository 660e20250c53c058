"""The number by which the best checkpoint is chosen."""

import pytest

from narvl_jax.data.example import TASKS
from narvl_jax.errors import UserError
from narvl_jax.evaluation import score
from narvl_jax.evaluation.metrics import METRICS

REPORT = {
  "split": "validation",
  "tasks": {
    "vqa": {"accuracy": 0.5},
    "grounding": {"acc@0.5": 0.25, "mean_iou": 0.75},
  },
}


def test_mean_is_over_the_main_metrics():
  assert score.score_of(REPORT, "mean") == 0.375


def test_one_metric():
  assert score.score_of(REPORT, "grounding/mean_iou") == 0.75


def test_without_ground_truth_there_is_no_score():
  report = {"tasks": {"vqa": {}, "grounding": {"acc@0.5": 0.5}}}
  assert score.score_of(report, "mean") == 0.5
  assert score.score_of(report, "vqa/accuracy") is None
  assert score.score_of({"tasks": {"vqa": {}}}, "mean") is None


def test_flat_metrics():
  assert score.flat_metrics(REPORT) == {
    "validation/vqa/accuracy": 0.5,
    "validation/grounding/acc@0.5": 0.25,
    "validation/grounding/mean_iou": 0.75,
  }


def test_every_task_has_metrics():
  assert set(METRICS) == set(TASKS)


@pytest.mark.parametrize("name", ["mean", "vqa/accuracy", "grounding/mean_iou"])
def test_measured_metrics_pass(name):
  score.check_best_metric(name, ["vqa", "grounding"])


@pytest.mark.parametrize(
  ("name", "hint"),
  [
    ("vqa/acuracy", r'Did you mean "vqa/accuracy"'),
    ("entailment/accuracy", r"--config.evaluation.best_metric"),
    ("loss", r"Valid: grounding/acc@0.5, .*mean"),
  ],
)
def test_other_metrics_are_mistakes(name, hint):
  with pytest.raises(UserError, match=f'"{name}" is not measured.*{hint}'):
    score.check_best_metric(name, ["vqa", "grounding"])
