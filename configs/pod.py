"""The official sizes at 480 pixels, sharded for a TPU pod.

    python -m narvl_jax.compile_check --config=configs/pod.py:base \
      --topology=v5e:16x16
    python -m narvl_jax.train --config=configs/pod.py:base --workdir=RUN \
      --config.vocabulary.path=FOLDER

Variants: `base`, `large` and `huge`. The first command needs no TPU and no
data. To train, FOLDER must contain the official `dict.txt`, `encoder.json` and
`vocab.bpe`; the data are procedural scenes until `data.train` is set to
yours.

The recipe is that of the official RefCOCO scripts (8 GPUs, global batch 128):
learning rate, warm-up, linear decay, stochastic depth, label smoothing,
AdamW's constants. The batch is that of a pod, 8 examples a chip on 256 chips,
and the learning rate was not tuned for it.

Training was not measured. docs/performance.md lists memory and operations, as
compiled. The statistics of BatchNorm are frozen: start from official weights
(`--config.init_from=FOLDER`) or set `--config.model.batch_norm=batch`.
"""

from ml_collections import ConfigDict

from narvl_jax.configs import official
from narvl_jax.configs.common import (
  choose_variant,
  default_config,
  evaluation_source,
  train_source,
  update,
)

_TASKS = ("caption", "vqa", "grounding", "entailment")
_IMAGE_SIZE = 480


# Size -> learning rate and stochastic depth.
_VARIANTS = {"base": (5e-5, 0.1), "large": (3e-5, 0.2), "huge": (3e-5, 0.2)}


def get_config(arg: str = "base") -> ConfigDict:
  """Returns the config of a variant: "base", "large" or "huge"."""
  size = arg or "base"
  return _pod(size, *choose_variant(size, _VARIANTS))


def _pod(size: str, learning_rate: float, drop_path: float) -> ConfigDict:
  config = default_config(*_TASKS)
  for task in _TASKS:
    options = {"image_size": _IMAGE_SIZE, "difficulty": "easy"}
    config.data.train[task] = train_source("shapes", task, **options)
    config.data.evaluation[task] = evaluation_source("shapes", task, **options)
  steps = 20_000
  update(
    config,
    {
      **official.SETTINGS,
      "data.image_size": (_IMAGE_SIZE, _IMAGE_SIZE),
      "data.max_text_length": 80,
      "data.max_label_length": 20,
      "model.size": size,
      "model.num_queries": 20,
      # Batch statistics need 364 small all-reduces and a sixth of the step.
      "model.batch_norm": "frozen",
      "loss.label_smoothing": 0.1,
      "optimizer.warmup_steps": int(0.06 * steps),
      "train.steps": steps,
      "train.batch_size": 2048,
      "train.eval_every": 2000,
      "train.checkpoint_every": 1000,
      # State is split over 16 chips and replicated beyond them.
      "mesh.data": -1,
      "mesh.fsdp": 16,
      "optimizer.learning_rate": learning_rate,
      "model.encoder_drop_path": drop_path,
      "model.decoder_drop_path": drop_path,
    },
  )
  return config
