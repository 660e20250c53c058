"""COCO captions (Karpathy's split), fine-tuned from official OFA weights.

    python -m narvl_jax.train --config=configs/caption.py:size=huge \
      --workdir=runs/caption --config.init_from=runs/ofa_huge \
      --config.vocabulary.path=FOLDER

`docs/recipes.md` describes every step from the downloaded files to the result,
and the arguments `size`, `epochs`, `data` and `split`. The data are
`data/caption_{stage1_train,val,test}.tsv`.

There is one official script, `caption_stage1_huge_distill_from_huge_20`,
for huge; the other sizes have none and use its settings: learning
rate 1e-5, 5 epochs, batch 128, warm-up 6 %, label smoothing 0.1, drop path 0.1,
20 queries, 480 pixels. The table of embeddings is frozen, the row of the blank
included. It trains on captions of a teacher, which are not public; with
such a file, `caption_stage1_train_distill_huge.tsv`, add
`split=stage1_train_distill_huge`.

On the test split:

| model                        | BLEU-4 / METEOR / CIDEr / SPICE |           |
| ---------------------------- | ------------------------------- | --------- |
| NARVL, size not stated       | 36.4 / 28.7 / 123.1 / 22.5      | published |
| autoregressive OFA beside it | 41.0 / 30.9 / 138.2 / 24.2      | published |
| this config, any size        | not measured                    | ours      |

OFA (CIDEr): tiny 119.0, medium 130.4, base 138.2, large 142.2, huge 145.3
(published).
"""

from narvl_jax.configs.official import SIZES, Dataset, Recipe, official_config
from narvl_jax.experiment.config import Config

DATASET = Dataset(
  "caption",
  "caption",
  # Captions of the 113,287 training pictures; not verified for OFA's file.
  train_rows=566_747,
  train="stage1_train",
  # The id is that of the picture: scores are by picture.
  test_columns="1,4,2",
)

RECIPES = dict.fromkeys(SIZES, Recipe(1e-5, epochs=5, drop_path=0.1))

_SETTINGS = {
  "model.num_queries": 20,
  "data.image_size": (480, 480),
  # The prompt is always the same.
  "data.max_text_length": 16,
  # Twenty words may be more labels than queries; such captions count in the
  # mean, as they do in the official code.
  "data.max_label_length": 64,
  "loss.label_smoothing": 0.1,
  "optimizer.rules": (("embed_tokens", {"freeze": True}), (".*", {})),
  "train.batch_size": 128,
}


def get_config(arg: str = "") -> Config:
  """Returns the config; see `official.parse_arguments` for the argument."""
  return official_config(arg, DATASET, RECIPES, _SETTINGS)
