"""Small stored evaluations, as `narvl_jax.evaluate` writes them."""

import json
import os
import pathlib
from typing import Any

from narvl_jax.evaluation import reporting


def prediction(index: int = 0, **changes: Any) -> dict[str, Any]:
  """Returns a prediction of a question, its score as `score`."""
  score = changes.pop("score", 1.0)
  return {
    "id": str(100 + index),
    "task": "vqa",
    "kind": "",
    "prompt": "what?",
    "prediction": "red",
    "target": "red",
    "probability": 0.5,
    "correct": score >= 0.5,
    "scores": {"accuracy": score},
    "answers": {"red": 1.0},
    "dataset": "vqa",
    "index": index,
    **changes,
  }


def store(
  run: pathlib.Path,
  predictions: list[dict[str, Any]],
  *,
  time: float = 0,
  **changes: Any,
) -> pathlib.Path:
  """Writes predictions and their report into a run folder.

  Args:
    run: the folder.
    predictions: of all tasks.
    time: when the report was written, in seconds.
    **changes: of the report.

  Returns:
    The file of the predictions.
  """
  counts: dict[str, int] = {}
  for x in predictions:
    counts[x["task"]] = counts.get(x["task"], 0) + 1
  report = {"split": "test", "step": 7, "decoding_name": "greedy"}
  report |= {"max_examples": None, "only_tasks": None, "counts": counts}
  report |= {"examples": len(predictions), **changes}
  name = reporting.file_name(report)
  for folder in ("evaluations", "predictions"):
    (run / folder).mkdir(parents=True, exist_ok=True)
  path = run / "evaluations" / f"{name}.json"
  path.write_text(json.dumps(report))
  os.utime(path, (time, time))
  file = run / "predictions" / f"{name}.jsonl"
  reporting.write_predictions(file, predictions)
  return file
