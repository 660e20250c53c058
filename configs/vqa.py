"""VQA v2: an answer to a question, fine-tuned from official OFA weights.

    python -m narvl_jax.train --config=configs/vqa.py:size=base \
      --workdir=runs/vqa --config.init_from=runs/ofa_base \
      --config.vocabulary.path=FOLDER

`docs/recipes.md` describes every step from the downloaded files to the result,
and the arguments `size`, `epochs`, `data` and `split`. The data are
`data/vqa_{train,val}.tsv`. `val` is the part that OFA keeps (about 10,000
questions); the answers of the test split are not public.

| size   | official script    | warm-up        | targets             |
| ------ | ------------------ | -------------- | ------------------- |
| tiny   | none: as base      | 4 %            |                     |
| medium | none: as base      | 4 %            |                     |
| base   | vqa_base_6         | 4 %            | true answers        |
| large  | none: as base      | 4 %            |                     |
| huge   | vqa_huge_6_distill | none, no decay | a teacher's answers |

Learning rate 5e-5, 10 epochs, batch 512, label smoothing 0.1, drop path 0.1, 6
queries, 480 pixels, moving averages (0.9999) from the first update on. The
table of embeddings is frozen, the row of the blank included. A warm-up ratio
of 0 disables the decay of the official schedule; here it is a constant rate.
`split=train_distill_huge` trains on a teacher's answers in
`vqa_train_distill_huge.tsv`.

The number of rows of the training file is not published; a million is a
placeholder until the file is read.

Accuracy on test-dev / test-std, per cent:

| model                                 |               |           |
| ------------------------------------- | ------------- | --------- |
| NARVL, most likely base and distilled | 75.69 / 75.75 | published |
| autoregressive OFA beside it          | 77.48 / 77.58 | published |
| this config, any size                 | not measured  | ours      |

OFA (test-std): tiny 70.4, medium 75.5, base 78.1, large 80.7, huge 82.0
(published).
"""

from narvl_jax.configs.official import Dataset, Recipe, official_config
from narvl_jax.experiment.config import Config

DATASET = Dataset("vqa", "vqa", train_rows=1_000_000, test="val")

_BASE = Recipe(5e-5, epochs=10, drop_path=0.1, warmup=0.04)
RECIPES = {
  "tiny": _BASE,
  "medium": _BASE,
  "base": _BASE,
  "large": _BASE,
  "huge": Recipe(5e-5, epochs=10, drop_path=0.1, warmup=0.0),
}

_SETTINGS = {
  "model.num_queries": 6,
  "data.image_size": (480, 480),
  # A question, and the names of 30 objects.
  "data.max_text_length": 128,
  # Longer than the queries: such answers count in the mean, as they do in the
  # official code.
  "data.max_label_length": 20,
  "loss.label_smoothing": 0.1,
  "optimizer.rules": (("embed_tokens", {"freeze": True}), (".*", {})),
  "optimizer.ema_decay": 0.9999,
  "optimizer.ema_warmup": False,
  "train.batch_size": 512,
}


def get_config(arg: str = "") -> Config:
  """Returns the config; see `official.parse_arguments` for the argument."""
  return official_config(arg, DATASET, RECIPES, _SETTINGS)
