"""The settings of an experiment: one row for each key of a config.

Defaults, checks, `--helpfull`, docs/config.md and the rules about which
settings may change all come from `KEYS`.
"""

from narvl_jax.data.pictures.files import EXIF_ORIENTATIONS
from narvl_jax.experiment.setting import Change, Setting
from narvl_jax.metrics.vqa import RULES
from narvl_jax.models import SIZES
from narvl_jax.models.sizes import (
  ATTENTIONS,
  BATCH_NORM_MODES,
  DECODERS,
  IMAGE_ENCODERS,
  REMAT_POLICIES,
)
from narvl_jax.parallel.rules import DEFAULT_RULES
from narvl_jax.query_ctc.loss import CONFIDENCE_MODES


def _model(kind: type, text: str, choices: tuple[str, ...] = ()) -> Setting:
  return Setting(None, text, choices=choices, kind=kind)


def _seconds(default: float, what: str) -> Setting:
  text = f"Seconds without progress {what} before the run ends; 0: no limit."
  return Setting(default, text, 0, change="resume")


# Dotted name -> setting. `{}` is a section whose keys a config file adds.
KEYS: dict[str, Setting] = {
  "seed": Setting(0, "Seed of weights, data order and dropout.", 0, 2**32 - 1),
  "init_from": Setting(
    "",
    "Folder of a run or of converted weights to start from; empty: random"
    " weights. A parallel and an autoregressive model can start from each"
    " other.",
  ),
  "init_renames": Setting(
    (),
    r"((regex, replacement), ...) for stored parameter names; the first regex"
    r" that matches the whole name is used, \1 is its first group.",
  ),
  "init_drops": Setting(
    (),
    "(regex, ...) of names, after the renames, that are initialised at random"
    " instead of copied from init_from.",
  ),
  "model.size": Setting("micro", f"Named size: {', '.join(SIZES)}."),
  "model.width": _model(int, "Model width D."),
  "model.mlp_width": _model(int, "Hidden width of the feed-forward blocks."),
  "model.num_heads": _model(int, "Attention heads; must divide the width."),
  "model.encoder_layers": _model(int, "Encoder depth."),
  "model.decoder_layers": _model(int, "Decoder depth."),
  "model.resnet_blocks": _model(
    tuple, "Bottleneck blocks in each of the three ResNet stages."
  ),
  "model.resnet_width": _model(int, "Channels of the ResNet stem."),
  "model.decoder": _model(
    str,
    "parallel predicts in one pass (NARVL), autoregressive token by token"
    " (OFA).",
    DECODERS,
  ),
  "model.num_queries": _model(
    int, "Learnable queries N of the parallel decoder."
  ),
  "model.vocab_multiple": _model(
    int, "The embedding table is padded to a multiple of this."
  ),
  "model.max_text_positions": _model(int, "Rows of the text position tables."),
  "model.token_bucket_size": _model(
    int, "Relative token distances have 2 * size - 1 buckets."
  ),
  "model.image_bucket_size": _model(
    int, "Largest side of the image grid, in tokens of 16 pixels."
  ),
  "model.dropout": _model(
    float, "Dropout rate of embeddings and residual branches."
  ),
  "model.encoder_drop_path": _model(
    float, "Stochastic depth of the last encoder layer."
  ),
  "model.decoder_drop_path": _model(
    float, "Stochastic depth of the last decoder layer."
  ),
  "model.batch_norm": _model(
    str,
    "In training, normalise with the running statistics (frozen) or with those"
    " of the global batch (batch).",
    BATCH_NORM_MODES,
  ),
  "model.remat": _model(
    str,
    "What the backward pass recomputes: nothing, all but matrix products, or"
    " every layer.",
    REMAT_POLICIES,
  ),
  "model.attention": _model(
    str,
    "How the encoder attends: xla, heads (one at a time), blocks (of queries,"
    " less memory), pallas (kernel for TPU), cudnn (GPU, not run yet); auto:"
    " pallas on TPU, heads on CPU, otherwise xla.",
    ATTENTIONS,
  ),
  "model.scan_unroll": _model(int, "Layers per iteration of the layer scan."),
  "model.init_stddev": _model(
    float, "Standard deviation of the linear maps at initialisation."
  ),
  "model.image_encoder": _model(
    str, "resnet (OFA), or conv: three convolutions.", IMAGE_ENCODERS
  ),
  "model.patch_size": _model(
    int, "Pixels per side of an image token with conv; even."
  ),
  "model.entangle_positions": _model(
    bool, "Add absolute positions to the token content as well."
  ),
  "model.dtype": Setting(
    "auto",
    "Type of activations; auto: float32 on a CPU, bfloat16 elsewhere."
    " Parameters are float32.",
    choices=("auto", "float32", "bfloat16"),
  ),
  "vocabulary.source": Setting(
    "train",
    "train: learned from data.train; official or huggingface: files in"
    " vocabulary.path; run: the vocabulary of the run folder vocabulary.path.",
    choices=("train", "official", "huggingface", "run"),
  ),
  "vocabulary.size": Setting(1000, "Ids of a learned vocabulary.", 1),
  "vocabulary.path": Setting(
    "", "Folder of the vocabulary files, or of a run."
  ),
  "vocabulary.num_bins": Setting(1000, "Coordinate tokens for boxes.", 0),
  "vocabulary.num_codes": Setting(0, "Image code tokens of official files.", 0),
  "tasks": Setting({}, "Settings of each task of the run; see docs/data.md."),
  "data.image_size": Setting(
    (480, 480), "(height, width) of images in pixels."
  ),
  "data.exif_orientation": Setting(
    "ignore",
    "ignore reads images as stored, like the reference; apply turns them"
    " upright.",
    choices=EXIF_ORIENTATIONS,
  ),
  "data.max_text_length": Setting(80, "Source tokens, with bos and eos.", 1),
  "data.max_label_length": Setting(20, "Target tokens.", 1),
  "data.num_workers": Setting(
    0,
    "Processes that prepare batches; 0: threads of the main process.",
    0,
    change="resume",
  ),
  "data.num_threads": Setting(
    2, "Threads of each such process.", 0, change="resume"
  ),
  "data.prefetch": Setting(
    4, "Batches that each process prepares ahead.", 1, change="resume"
  ),
  "data.max_bad_fraction": Setting(
    0.01,
    "Fraction of a source's records that may be unusable before the run stops.",
    0,
    1,
    change="resume",
  ),
  "data.temperature": Setting(
    0.0,
    "T > 0 multiplies the weight of a source by size ** (1 / T); 0: off.",
    0,
  ),
  "data.train": Setting(
    {}, "NAME: train_source(...), the training data.", change="report"
  ),
  "data.evaluation": Setting(
    {}, "NAME: evaluation_source(...), the evaluation data.", change="report"
  ),
  "loss.label_smoothing": Setting(0.0, "Label smoothing.", 0, 0.999),
  "loss.confidence": Setting(
    "weight",
    "How the confidence of a VQA answer enters the loss: as a weight, or as a"
    " temperature of the logits as in the official code.",
    choices=CONFIDENCE_MODES,
  ),
  "loss.chunk_size": Setting(
    4096,
    "Classes whose gradient exists at a time; 0: all. With a larger vocabulary,"
    " logits exist for a few examples at a time.",
    0,
  ),
  "loss.average": Setting(
    "labels",
    "Autoregressive models: average a batch over labels (reference) or over"
    " examples, as parallel models do.",
    choices=("labels", "examples"),
  ),
  "loss.constrained": Setting(
    False,
    "Autoregressive models: normalise over the tokens that may follow in the"
    " closed answer sets of VQA and entailment.",
  ),
  "loss.drop_worst": Setting(
    0.0, "Fraction of labels with the highest loss to leave out.", 0, 0.999
  ),
  "loss.drop_worst_after": Setting(0, "Step from which drop_worst applies.", 0),
  "distillation.teacher": Setting(
    "",
    "Run folder of an autoregressive model with the same vocabulary, whose"
    " distributions a parallel model learns; empty: none.",
  ),
  "distillation.weight": Setting(
    0.5, "Weight of the distillation loss; the labels have the rest.", 0, 1
  ),
  "distillation.temperature": Setting(
    1.0, "Above 1 softens both distributions.", 0.01
  ),
  "optimizer.name": Setting("adamw", "Optimizer.", choices=("adamw", "muon")),
  "optimizer.learning_rate": Setting(1e-3, "Peak learning rate.", 0),
  "optimizer.schedule": Setting(
    "cosine",
    "Decay of the learning rate after the warm-up.",
    choices=("linear", "cosine", "constant"),
  ),
  "optimizer.warmup_steps": Setting(
    0, "Steps of linear warm-up; below train.steps."
  ),
  "optimizer.weight_decay": Setting(0.01, "Decoupled weight decay.", 0),
  "optimizer.b1": Setting(0.9, "Decay of the first moment.", 0, 0.99999),
  "optimizer.b2": Setting(0.999, "Decay of the second moment.", 0, 0.9999999),
  "optimizer.eps": Setting(1e-8, "Epsilon of Adam.", 1e-16),
  "optimizer.eps_placement": Setting(
    "standard",
    "What epsilon is added to: the root of the second moment after (standard)"
    " or before (official) its bias correction; muon has its own.",
    choices=("standard", "official"),
    # Runs of recipes from before the key resume with the official one.
    change="resume",
  ),
  "optimizer.clip_norm": Setting(
    1.0, "Largest norm of the gradient; 0: none.", 0
  ),
  "optimizer.ema_decay": Setting(
    0.0, "Decay of moving averages of the parameters; 0: none.", 0, 0.9999999
  ),
  "optimizer.ema_warmup": Setting(
    True, "Start the moving averages with a smaller decay."
  ),
  "optimizer.rules": Setting(
    ((".*", {}),),
    "((regex, {lr, decay, freeze}), ...); the first regex that matches the"
    " path of a parameter is used.",
  ),
  "train.epoch_examples": Setting(
    0,
    "Examples of an epoch in a config whose numbers of steps depend on them;"
    " counted in data.train when a run starts. 0: they do not.",
    0,
    change="resume",
  ),
  "train.steps": Setting(1000, "Optimizer updates.", 1, change="report"),
  "train.batch_size": Setting(
    128, "Examples of an update, on all devices.", 1, change="report"
  ),
  "train.accumulation_steps": Setting(
    1, "Parts of a batch that are computed one by one.", 1, change="report"
  ),
  "train.log_every": Setting(
    50, "Steps between log lines.", 1, change="report"
  ),
  "train.eval_every": Setting(
    0, "Steps between evaluations; 0: only at the end.", 0, change="report"
  ),
  "train.eval_split": Setting(
    "validation", "Split of these evaluations.", change="report"
  ),
  "train.eval_examples": Setting(
    256, "Largest number of examples per data set.", 1, change="report"
  ),
  "train.checkpoint_every": Setting(
    500, "Steps between checkpoints; 0: only at the end.", 0, change="report"
  ),
  "train.keep_last": Setting(
    2, "Newest checkpoints to keep.", 1, change="resume"
  ),
  "train.keep_best": Setting(
    1,
    "Best checkpoints to keep, by evaluation.best_metric.",
    0,
    change="resume",
  ),
  "train.keep_every": Setting(
    0, "Keep the checkpoint of every n-th step; 0: none.", 0, change="resume"
  ),
  "bad_numbers.policy": Setting(
    "stop",
    "On a loss or gradient that is not finite: stop the run, skip the update,"
    " or rollback to the last checkpoint and leave the batch out.",
    choices=("stop", "skip", "rollback"),
    change="resume",
  ),
  "bad_numbers.limit": Setting(
    10, "Skipped updates or rollbacks before the run stops.", 0, change="resume"
  ),
  "bad_numbers.spike_factor": Setting(
    3.0,
    "A loss above this many medians of the last 100 is counted as a spike; 0:"
    " none.",
    0,
    change="resume",
  ),
  "evaluation.split": Setting(
    "test", "Split of the final evaluation.", change="report"
  ),
  "evaluation.batch_size": Setting(
    128, "Examples at a time.", 1, change="report"
  ),
  "evaluation.max_examples": Setting(
    0, "Largest number of examples per data set; 0: all.", 0, change="report"
  ),
  "evaluation.mask_specials": Setting(True, "Predict no special symbols."),
  "evaluation.best_metric": Setting(
    "mean",
    "Decides which checkpoint is best: the mean of the tasks' main scores, or"
    " TASK/METRIC.",
    change="report",
  ),
  "evaluation.vqa_rule": Setting(
    "vqa_v2",
    "How vqa_accuracy compares an answer with those of people: by the rule of"
    " VQA v2, OK-VQA or A-OKVQA.",
    choices=tuple(RULES),
    change="report",
  ),
  "tracking.trackers": Setting(
    ("jsonl", "tensorboard"),
    "Where metrics go: tensorboard, wandb, trackio; metrics.jsonl is always"
    " written.",
    choices=("jsonl", "tensorboard", "wandb", "trackio"),
    change="resume",
  ),
  "tracking.project": Setting(
    "narvl_jax", "Project in wandb and trackio.", change="resume"
  ),
  "tracking.name": Setting(
    "",
    "Name of the run in wandb and trackio; empty: that of its folder.",
    change="resume",
  ),
  "watchdog.start": _seconds(3600.0, "in reading, connecting and restoring"),
  "watchdog.compile": _seconds(3600.0, "in compiling"),
  "watchdog.step": _seconds(900.0, "in an update"),
  "watchdog.data_wait": _seconds(900.0, "in waiting for a batch"),
  "watchdog.evaluation": _seconds(
    3600.0, "between two batches of an evaluation"
  ),
  "watchdog.checkpoint": _seconds(1800.0, "in saving"),
  "watchdog.other": _seconds(1800.0, "elsewhere"),
  "profile.steps": Setting(
    0, "Updates of a trace by jax.profiler; 0: none.", 0, change="resume"
  ),
  "profile.start_step": Setting(
    10,
    "First update of the first trace, counted from the start of the process.",
    1,
    change="resume",
  ),
  "profile.every": Setting(
    0,
    "Updates from the start of a trace to the next; 0: only one trace.",
    0,
    change="resume",
  ),
  "profile.dir": Setting(
    "",
    "Folder of the traces; empty: traces in the run folder.",
    change="resume",
  ),
  "debug.dump_hlo": Setting(
    "",
    "Folder for the programs of the update and of a prediction, as StableHLO"
    " and optimised; empty: none.",
    change="resume",
  ),
  "mesh.data": Setting(
    -1, "Size of the data axis; -1: all remaining devices.", change="resume"
  ),
  "mesh.fsdp": Setting(
    1, "Size of the axis that shards parameters.", change="resume"
  ),
  "mesh.tensor": Setting(
    1, "Size of the axis that splits matrix products.", change="resume"
  ),
  "mesh.slices": Setting(
    -1, "Slices of the devices; -1: as the devices report.", change="resume"
  ),
  "mesh.rules": Setting(
    DEFAULT_RULES,
    "(logical axis, mesh axis) pairs; see narvl_jax/parallel/rules.py.",
    change="resume",
  ),
}


def may_change(key: str, *changes: Change) -> bool:
  """Returns whether a key, or its section, has one of these `changes`.

  Args:
    key: dotted, such as "data.train.vqa.weight".
    *changes: the accepted values of `Setting.change`.
  """
  parts = key.split(".")
  for length in range(len(parts), 0, -1):
    found = KEYS.get(".".join(parts[:length]))
    if found is not None:
      return found.change in changes
  # An unknown key, from a config of another version.
  rows = [row for name, row in KEYS.items() if name.startswith(f"{parts[0]}.")]
  return bool(rows) and all(row.change in changes for row in rows)
