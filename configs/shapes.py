"""Four tasks on procedural scenes, from random weights, on a CPU.

    python -m narvl_jax.train --config=configs/shapes.py --workdir=runs/shapes

| variant  | time       | VQA  | entailment | Acc@0.5 | captions exact |
| -------- | ---------- | ---- | ---------- | ------- | -------------- |
| (none)   | 8 min 49 s | 96.9 | 94.3       | 90.9    | 98.1           |
| `:quick` | 2 min 34 s | 47.2 | 55.4       | 42.8    | 18.4           |
| `:long`  | 40 min     | 98.6 | 98.0       | 94.0    | 99.8           |
| `:full`  | for accelerators, not measured                         |

Per cent on the test split (4000 scenes a task, `:quick` 500), one run each,
seed 0, jax 0.10.2, 2026-11-24, two cores of an AMD EPYC (`:long`: one) that
other work shared at times. The times are from start to end.
docs/experiments.md explains the settings.
"""

from ml_collections import ConfigDict

from narvl_jax.configs.common import (
  choose_variant,
  default_config,
  evaluation_source,
  from_scratch,
  train_source,
  update,
)

# Share of each task before and after `seeing_steps`. Captions and boxes teach
# the model to recognise shapes, which questions require.
_SHARES = {
  "caption": (0.45, 0.15),
  "grounding": (0.45, 0.15),
  "vqa": (0.10, 0.40),
  "entailment": (0.00, 0.30),
}
# Shares of a run that is too short for two phases.
_QUICK_SHARES = {
  "caption": (0.35, 0.35),
  "grounding": (0.35, 0.35),
  "vqa": (0.15, 0.15),
  "entailment": (0.15, 0.15),
}


def get_config(arg: str = "") -> ConfigDict:
  """Returns the config of a variant: "", "quick", "long" or "full"."""
  variant = choose_variant(
    arg, {"": _easy, "quick": _quick, "long": _long, "full": _full}
  )
  return variant()


def _easy() -> ConfigDict:
  config = _small("easy", image_size=48, steps=2000, seeing_steps=700)
  update(
    config,
    {
      "train.eval_every": 500,
      "train.eval_examples": 250,
      "train.checkpoint_every": 500,
    },
  )
  return config


def _quick() -> ConfigDict:
  config = _small(
    "easy", image_size=48, steps=500, seeing_steps=500, shares=_QUICK_SHARES
  )
  update(
    config,
    {
      "train.log_every": 25,
      "train.eval_every": 100,
      "train.eval_examples": 100,
      "evaluation.max_examples": 500,
    },
  )
  return config


def _long() -> ConfigDict:
  config = _small("easy", image_size=48, steps=5000, seeing_steps=800)
  update(config, {"train.eval_every": 1000, "train.eval_examples": 500})
  return config


def _full() -> ConfigDict:
  config = _small("full", image_size=96, steps=40_000, seeing_steps=8000)
  from_scratch(config, width=256)
  update(
    config,
    {
      "model.encoder_layers": 4,
      "model.decoder_layers": 3,
      # Five objects of five words and four times "and" are 29 labels.
      "model.num_queries": 32,
      "model.max_text_positions": 40,
      "model.image_bucket_size": 12,
      "data.max_text_length": 24,
      "data.max_label_length": 32,
      "vocabulary.num_bins": 49,
      "train.batch_size": 256,
      "train.eval_every": 2000,
    },
  )
  return config


def _small(
  difficulty: str,
  *,
  image_size: int,
  steps: int,
  seeing_steps: int,
  shares: dict[str, tuple[float, float]] = _SHARES,
) -> ConfigDict:
  """Sets up all variants; the shares change at `seeing_steps`."""
  config = default_config(*shares)
  options = {"image_size": image_size, "difficulty": difficulty}
  for task, (first, then) in shares.items():
    config.data.train[task] = train_source(
      "shapes", task, weight=((0, first), (seeing_steps, then)), **options
    )
    config.data.evaluation[task] = evaluation_source("shapes", task, **options)
  from_scratch(config, width=128)
  update(
    config,
    {
      "model.encoder_layers": 2,
      "model.decoder_layers": 2,
      "model.scan_unroll": 2,
      # Three objects of four words and twice "and" are 14 labels.
      "model.num_queries": 16,
      "vocabulary.size": 400,
      # Two pixels per bin.
      "vocabulary.num_bins": 25,
      "data.image_size": (image_size, image_size),
      "data.max_label_length": 14,
      "train.steps": steps,
      "train.batch_size": 64,
    },
  )
  # Short prompts: the encoder pays for every token of every example.
  config.tasks.caption.prompt = "describe"
  config.tasks.grounding.prompt = "find {}"
  config.tasks.entailment.prompt = "claim {}"
  return config
