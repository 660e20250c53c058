"""Figures that papers report, computed from predictions and ground truth.

The modules need neither a model nor a data set of this project: they take
texts, boxes and numbers. `narvl_jax.evaluation` applies them to predictions.

| module        | figures                                                      |
| ------------- | ------------------------------------------------------------ |
| `captions`    | BLEU-1..4, METEOR, ROUGE-L, CIDEr, SPICE by pycocoevalcap    |
| `cider`       | CIDEr-D in NumPy, with document frequencies from a file      |
| `tokenizers`  | tokens of captions: PTB (Java) and a plain one               |
| `vqa`         | accuracy by the rules of VQA v2, OK-VQA and A-OKVQA          |
| `classes`     | accuracy per class, confusion matrix, POPE                   |
| `calibration` | temperature, expected calibration error, abstaining          |
| `bootstrap`   | confidence intervals, differences of two systems             |
"""
