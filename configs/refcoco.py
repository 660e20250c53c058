"""RefCOCO: a box for an expression, fine-tuned from official OFA weights.

    python -m narvl_jax.train --config=configs/refcoco.py:size=base \
      --workdir=runs/refcoco --config.init_from=runs/ofa_base \
      --config.vocabulary.path=FOLDER

`docs/recipes.md` describes every step from the downloaded files to the result,
and the arguments `size`, `epochs`, `data` and `split`. The data are
`data/refcoco_{train,val,testA,testB}.tsv`.

| size   | official script | learning rate | epochs | drop path |
| ------ | --------------- | ------------- | ------ | --------- |
| tiny   | refcoco_tiny_5  | 5e-5          | 50     | 0.1       |
| medium | none: as base   | 5e-5          | 10     | 0.1       |
| base   | refcoco_base_5  | 5e-5          | 10     | 0.1       |
| large  | refcoco_large_5 | 3e-5          | 10     | 0.2       |
| huge   | refcoco_huge_5  | 3e-5          | 10     | 0.2       |

Batch 128, warm-up 6 %, label smoothing 0.1, 5 queries, 512 pixels.

Acc@0.5 on val / testA / testB, per cent:

| model                        |                       |           |
| ---------------------------- | --------------------- | --------- |
| NARVL, most likely base      | 88.78 / 90.63 / 84.67 | published |
| autoregressive OFA beside it | 88.15 / 90.08 / 83.45 | published |
| this config, any size        | not measured          | ours      |

OFA (val): tiny 80.20, medium 85.34, base 88.48, large 90.05, huge 92.04
(published).
"""

from narvl_jax.configs.official import Dataset, Recipe, official_config
from narvl_jax.experiment.config import Config

DATASET = Dataset(
  "refcoco", "grounding", train_rows=120_624, test="testA", partition="unc"
)

RECIPES = {
  "tiny": Recipe(5e-5, epochs=50, drop_path=0.1),
  "medium": Recipe(5e-5, epochs=10, drop_path=0.1),
  "base": Recipe(5e-5, epochs=10, drop_path=0.1, seed=2),
  "large": Recipe(3e-5, epochs=10, drop_path=0.2),
  "huge": Recipe(3e-5, epochs=10, drop_path=0.2),
}

# Of the RefCOCO family. Four bins and eos are five labels: each query has its
# own, and a box with equal neighbouring bins contributes no gradient.
SETTINGS = {
  "model.num_queries": 5,
  "data.image_size": (512, 512),
  "data.max_text_length": 80,
  "data.max_label_length": 5,
  "loss.label_smoothing": 0.1,
  "train.batch_size": 128,
}


def get_config(arg: str = "") -> Config:
  """Returns the config; see `official.parse_arguments` for the argument."""
  return official_config(arg, DATASET, RECIPES, SETTINGS)
