"""Your own pictures and texts in JSON lines; see docs/data.md.

    python -m narvl_jax.train --config=configs/own_data.py:vqa \
      --config.data.train.own.options.path='DATA/own_{split}.jsonl' \
      --workdir=runs/own

The variant is the task. Several tasks are joined by a plus sign: `vqa+caption`
has the entries `own_vqa` and `own_caption`, which share one path. `{split}` is
replaced by train, validation or test.

300 steps on the 2,000 generated pictures of that page: 99.5 % of 400 questions,
in 3 minutes of processor time (one run, seed 0, jax 0.10.2, 2026-11-24).

A small model that is trained from random weights on a CPU. It suits a few
thousand simple pictures. For photographs set
`--config.model.size`, `--config.data.image_size` and a vocabulary as in
configs/pod.py.
"""

from ml_collections import ConfigDict, config_dict

from narvl_jax.configs.common import (
  default_config,
  evaluation_source,
  from_scratch,
  train_source,
  update,
)
from narvl_jax.data.example import TASKS
from narvl_jax.errors import UserError, did_you_mean

_IMAGE_SIZE = 64


def get_config(arg: str = "vqa") -> ConfigDict:
  """Returns the config of one task, or of several as in "vqa+caption"."""
  tasks = (arg or "vqa").split("+")
  for task in tasks:
    if task not in TASKS:
      raise UserError(
        f'this config has no task "{task}".{did_you_mean(task, TASKS)}'
        " (--config=FILE.py:TASK or TASK+TASK)"
      )
  config = default_config(*tasks)
  path = config_dict.placeholder(str)
  for task in tasks:
    name = "own" if len(tasks) == 1 else f"own_{task}"
    config.data.train[name] = train_source("jsonl", task, path=path)
    config.data.evaluation[name] = evaluation_source("jsonl", task, path=path)
  # Captions are sentences; the other answers are a word or two, or four bins.
  labels = 20 if "caption" in tasks else 8
  from_scratch(config, width=96)
  update(
    config,
    {
      "model.encoder_layers": 2,
      "model.decoder_layers": 1,
      "model.scan_unroll": 2,
      "model.num_queries": labels,
      "data.image_size": (_IMAGE_SIZE, _IMAGE_SIZE),
      # People look at pictures of phones upright when they write about them.
      "data.exif_orientation": "apply",
      "data.max_text_length": 24,
      "data.max_label_length": labels,
      "vocabulary.size": 1000,
      # Two pixels each; none where no box is read.
      "vocabulary.num_bins": 33 if "grounding" in tasks else 0,
      "train.steps": 1000,
      "train.batch_size": 64,
      "train.eval_every": 250,
    },
  )
  return config
