"""RefCOCOg: as RefCOCO, with longer expressions; the splits of UMD.

    python -m narvl_jax.train --config=configs/refcocog.py:size=base \
      --workdir=runs/refcocog --config.init_from=runs/ofa_base \
      --config.vocabulary.path=FOLDER

`docs/recipes.md` describes every step from the downloaded files to the result,
and the arguments `size`, `epochs`, `data` and `split`. The data are
`data/refcocog_{train,val,test}.tsv`.

| size   | official script | learning rate | epochs | drop path |
| ------ | --------------- | ------------- | ------ | --------- |
| tiny   | refcocog_tiny_5 | 3e-5          | 50     | 0.1       |
| medium | none: as base   | 5e-5          | 12     | 0.1       |
| base   | refcocog_base_5 | 5e-5          | 12     | 0.1       |
| large  | none: as huge   | 3e-5          | 15     | 0.1       |
| huge   | refcocog_huge_5 | 3e-5          | 15     | 0.1       |

Batch 128, warm-up 6 %, label smoothing 0.1, 5 queries, 512 pixels. The script
of tiny is a second round: it starts from an earlier NARVL run on RefCOCOg, not
from OFA (`--config.init_from=` also accepts the folder of such a run).

Acc@0.5 on val / test, per cent:

| model                        |               |           |
| ---------------------------- | ------------- | --------- |
| NARVL, most likely base      | 82.27 / 82.69 | published |
| autoregressive OFA beside it | 81.92 / 82.02 | published |
| this config, any size        | not measured  | ours      |
"""

from narvl_jax.configs.official import Dataset, Recipe, official_config
from narvl_jax.configs.refcoco import SETTINGS
from narvl_jax.experiment.config import Config

DATASET = Dataset("refcocog", "grounding", train_rows=80_512, partition="umd")

RECIPES = {
  "tiny": Recipe(3e-5, epochs=50, drop_path=0.1),
  "medium": Recipe(5e-5, epochs=12, drop_path=0.1),
  "base": Recipe(5e-5, epochs=12, drop_path=0.1),
  "large": Recipe(3e-5, epochs=15, drop_path=0.1),
  "huge": Recipe(3e-5, epochs=15, drop_path=0.1),
}


def get_config(arg: str = "") -> Config:
  """Returns the config; see `official.parse_arguments` for the argument."""
  return official_config(arg, DATASET, RECIPES, SETTINGS)
