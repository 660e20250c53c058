"""The smallest experiment that covers everything, used by many tests."""

from narvl_jax.experiment.config import (
  Config,
  default_config,
  evaluation_source,
  train_source,
)


def tiny_config() -> Config:
  """Returns a config of two tasks that trains in seconds."""
  config = default_config("vqa", "grounding")
  for task in ("vqa", "grounding"):
    config.data.train[task] = train_source("shapes", task, image_size=48)
    config.data.evaluation[task] = evaluation_source(
      "shapes", task, image_size=48
    )
  config.model.update(
    {
      "num_queries": 6,
      "width": 32,
      "mlp_width": 32,
      "num_heads": 2,
      "encoder_layers": 1,
      "decoder_layers": 1,
      "image_encoder": "conv",
      "patch_size": 16,
      "image_bucket_size": 4,
      "token_bucket_size": 16,
      "dropout": 0.0,
    }
  )
  config.vocabulary.num_bins = 8
  config.data.image_size = (48, 48)
  config.data.max_text_length = 40
  config.data.max_label_length = 6
  config.train.update(
    {
      "steps": 6,
      "batch_size": 8,
      "log_every": 2,
      "eval_every": 3,
      "eval_examples": 8,
      "checkpoint_every": 3,
    }
  )
  config.optimizer.update({"ema_decay": 0.9, "warmup_steps": 2})
  config.evaluation.batch_size = 8
  return config
