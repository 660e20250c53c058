"""RefCOCO+: as RefCOCO, with expressions without words of location.

    python -m narvl_jax.train --config=configs/refcocoplus.py:size=base \
      --workdir=runs/refcocoplus --config.init_from=runs/ofa_base \
      --config.vocabulary.path=FOLDER

`docs/recipes.md` describes every step from the downloaded files to the result,
and the arguments `size`, `epochs`, `data` and `split`. The data are
`data/refcocoplus_{train,val,testA,testB}.tsv`.

| size   | official script    | learning rate | epochs | drop path |
| ------ | ------------------ | ------------- | ------ | --------- |
| tiny   | refcocoplus_tiny_5 | 5e-5          | 50     | 0.1       |
| medium | none: as base      | 5e-5          | 10     | 0.1       |
| base   | refcocoplus_base_5 | 5e-5          | 10     | 0.1       |
| large  | none: as huge      | 3e-5          | 10     | 0.2       |
| huge   | refcocoplus_huge_5 | 3e-5          | 10     | 0.2       |

Batch 128, warm-up 6 %, label smoothing 0.1, 5 queries, 512 pixels.

Acc@0.5 on val / testA / testB, per cent:

| model                        |                       |           |
| ---------------------------- | --------------------- | --------- |
| NARVL, most likely base      | 82.35 / 87.15 / 74.74 | published |
| autoregressive OFA beside it | 81.67 / 86.40 / 74.49 | published |
| this config, any size        | not measured          | ours      |
"""

from narvl_jax.configs.official import Dataset, Recipe, official_config
from narvl_jax.configs.refcoco import SETTINGS
from narvl_jax.experiment.config import Config

DATASET = Dataset(
  "refcocoplus", "grounding", train_rows=120_191, test="testA", partition="unc"
)

RECIPES = {
  "tiny": Recipe(5e-5, epochs=50, drop_path=0.1),
  "medium": Recipe(5e-5, epochs=10, drop_path=0.1),
  "base": Recipe(5e-5, epochs=10, drop_path=0.1),
  "large": Recipe(3e-5, epochs=10, drop_path=0.2),
  "huge": Recipe(3e-5, epochs=10, drop_path=0.2),
}


def get_config(arg: str = "") -> Config:
  """Returns the config; see `official.parse_arguments` for the argument."""
  return official_config(arg, DATASET, RECIPES, SETTINGS)
