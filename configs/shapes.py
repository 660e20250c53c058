"""Four tasks on procedural scenes, from random weights, on a CPU.

    python -m narvl_jax.train --config=configs/shapes.py --workdir=runs/shapes

| variant  | time       | VQA  | entailment | Acc@0.5 | captions exact |
| -------- | ---------- | ---- | ---------- | ------- | -------------- |
| (none)   | 8 min 49 s | 96.9 | 94.3       | 90.9    | 98.1           |
| `:quick` | 2 min 34 s | 47.2 | 55.4       | 42.8    | 18.4           |
| `:long`  | 40 min     | 98.6 | 98.0       | 94.0    | 99.8           |
| `:full`  | for accelerators, not measured                         |

Per cent on the test split (4000 scenes a task, `:quick` 500), seed 0, jax
0.10.2, 2026-11-24, two cores of an AMD EPYC but for `:long`, which ran on one;
other work shared the cores at times. The times hold everything from start to
end. Boxes of (none) and `:long` were read again from the same weights, by
`narvl_jax.evaluate` with `tasks.grounding.merge_repeats=True` (see "Reading").

What was found on the way. Every line is one run of one seed, and examples
are compared, not seconds. "Equal" means a quarter of each batch of 64 for each
task.

Optimizer. Muon is what makes ten minutes enough. On scenes of one object the
nll per label of captions after 450 updates of 32 was 1.03 with AdamW (1.5e-3;
with 4e-3 it was 1.09) and 0.45 with Muon (5e-3); the words alone give 1.04.
Muon's rate: after 250 equal updates captions stood at 0.98 with 1.5e-2, 0.81
with 7e-3 and 0.72 with 3.5e-3.

Shares. 1500 equal updates ended at VQA 74.8, entailment 74.3, Acc@0.5 86.2,
captions 59.8 (test). Questions do not move before shapes are recognised, which
captions and boxes teach. With 45 % each for these two until update 700, and
then 40 and 30 % for questions and hypotheses, a run of 2000 updates stood at
91.0, 87.4, 87.4, 97.2 after 1500 of them (validation).

Length. Questions take off late, while the learning rate is high: a run of 1500
updates whose shares change at 500 ended at 72.5, 70.2, 84.0, 92.6 (test).

Reading. With spare queries the loss lets a label be said twice, so repeats
are merged. Without that 392 of 4000 boxes of `:long` had not four numbers, and
Acc@0.5 was 90.1 for 94.0; (none) lost by it, 90.9 for 92.0. What remains wrong
is nearly all of this sort: of the boxes with four numbers 99.9 % were right.

Positions. They are added to the content of the image tokens, too. With Muon
that turned out not to be needed: `:quick` with them in the attention logits
only, as in the reference, ended at Acc@0.5 45.8 for 42.8, captions 14.8 for
18.4. Those of the text must start small (0.02) if they are added: at the size
of the image's they drown the words.

Encoder. Flat 8 x 8 patches with AdamW and three layers came to VQA 42, Acc@0.5
25, captions 1 in 1250 equal updates (with text positions that were too large,
too). Three convolutions of stride 2 did as well as the stem in use.

Blanks. With N queries and one label, N - 1 queries are right to say nothing, so
a random model first learns to say nothing at all. The last probe at
which more than half of the answers were empty (every 10 updates, 64 pictures):

| what                                       | all blank until update |
| ------------------------------------------ | ---------------------- |
| as here: Muon 3.5e-3, N = 16               | 50                     |
| AdamW at the same rate                     | 60, a half until 80    |
| Muon 1e-2                                  | 30, a half until 40    |
| label smoothing 0.1                        | 50, a half until 60    |
| N = 32 for at most 14 labels               | 50, a half until 60    |
| logit of blank starts 3 lower / 3 higher   | 60 / 50                |
| queries start 50 times as large            | 50 (a LayerNorm follows) |

So it ends with the warm-up (50 updates), sooner at a higher rate, and hardly
depends on how queries and blank start; more queries cost time only. Smoothing
slows what follows (captions after 160 updates 1.03 for 0.96 per label).
The next plateau, guessing by the words alone, is the
long one, and there the optimizer decides: after 160 updates VQA stood at 1.48
with AdamW and 0.98 with Muon, captions at 1.97 and 0.96.
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

# Share of each task while the model learns to see, and from then on. Captions
# and boxes teach the eye best; questions need an eye to learn from.
_SHARES = {
  "caption": (0.45, 0.15),
  "grounding": (0.45, 0.15),
  "vqa": (0.10, 0.40),
  "entailment": (0.00, 0.30),
}
# A run too short for the second part: something of everything.
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
  """What the variants share; `seeing_steps` is when the shares change."""
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
      # Two pixels each.
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
