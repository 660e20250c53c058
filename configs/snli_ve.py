"""SNLI-VE: does a picture with a caption imply a sentence?

    python -m narvl_jax.train --config=configs/snli_ve.py:size=base \
      --workdir=runs/snli_ve --config.init_from=runs/ofa_base \
      --config.vocabulary.path=FOLDER

`docs/recipes.md` describes every step from the downloaded files to the result,
and the arguments `size`, `epochs`, `data` and `split`. The data are
`data/snli_ve_{train,dev,test}.tsv`.

| size   | official script | learning rate | epochs | drop path |
| ------ | --------------- | ------------- | ------ | --------- |
| tiny   | none: as base   | 5e-5          | 5      | 0.1       |
| medium | none: as base   | 5e-5          | 5      | 0.1       |
| base   | snli_ve_base_3  | 5e-5          | 5      | 0.1       |
| large  | none: as huge   | 2e-5          | 6      | 0.2       |
| huge   | snli_ve_huge_3  | 2e-5          | 6      | 0.2       |

Batch 256, warm-up 6 %, no label smoothing, 3 queries, 480 pixels. A second
script, snli_ve_base_1, starts from an earlier NARVL run with two queries:
`--config.model.num_queries=2` with weights that were converted with two.

Accuracy on dev / test, per cent:

| model                        |              |           |
| ---------------------------- | ------------ | --------- |
| NARVL, most likely base      | 89.0 / 89.0  | published |
| autoregressive OFA beside it | 89.0 / 89.0  | published |
| this config, any size        | not measured | ours      |

OFA (test): tiny 85.2, medium 87.0, base 89.2, large 90.2, huge 91.2
(published).
"""

from narvl_jax.configs.official import Dataset, Recipe, official_config
from narvl_jax.experiment.config import Config

DATASET = Dataset("snli_ve", "entailment", train_rows=529_527, validation="dev")

_BASE = Recipe(5e-5, epochs=5, drop_path=0.1)
_HUGE = Recipe(2e-5, epochs=6, drop_path=0.2)
RECIPES = {
  "tiny": _BASE,
  "medium": _BASE,
  "base": _BASE,
  "large": _HUGE,
  "huge": _HUGE,
}

_SETTINGS = {
  # One more than yes, no or maybe and eos need.
  "model.num_queries": 3,
  "data.image_size": (480, 480),
  # A caption and a hypothesis.
  "data.max_text_length": 128,
  "data.max_label_length": 2,
  "loss.label_smoothing": 0.0,
  "train.batch_size": 256,
}


def get_config(arg: str = "") -> Config:
  """Returns the config; see `official.parse_arguments` for the argument."""
  return official_config(arg, DATASET, RECIPES, _SETTINGS)
