"""Official weights as run folders, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from narvl_jax.data.example import TASKS
from narvl_jax.experiment.config import (
  Config,
  default_config,
  evaluation_source,
  train_source,
)
from narvl_jax.files.regular import sha256_of
from narvl_jax.interop import run_folder
from narvl_jax.interop.adapt import Options, with_config
from narvl_jax.interop.conversion import Conversion, convert_official
from narvl_jax.interop.export import save_official
from narvl_jax.interop.run_folder import VocabularyFiles
from narvl_jax.interop.tensors import PathLike
from narvl_jax.models import ModelConfig, make_model
from narvl_jax.terminal import progress
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import escape

# Sizes of the fixed request, which compares two machines.
_SIDE = 256
_TOKENS = 12


def import_official(
  source: PathLike,
  target: PathLike,
  *,
  options: Options | None = None,
  ema: bool = False,
  vocabulary: VocabularyFiles | None = None,
  config: Any = None,
  check: bool = False,
) -> dict[str, Any]:
  """Writes official weights as a run folder; returns its `report.json`.

  Args:
    source: file or Hugging Face folder.
    target: the run folder, new or empty.
    options: new and resized tensors.
    ema: use the moving averages of the file.
    vocabulary: where its files are, and its special tokens.
    config: config of the run; if None, all tasks with synthetic scenes. Its
      model size must be that of the weights; its decoder and number of queries
      are used; other settings that the weights determine are overwritten.
    check: run a fixed request and report the results.

  Raises:
    UserError: the file, an option or the folder is wrong; nothing is written.
  """
  run_folder.check_target(target)
  options = options or Options()
  if config is not None:
    options = with_config(options, config)
  with progress.doing(f"converting {source}"):
    made = convert_official(source, options, ema=ema)
  if config is not None:
    run_folder.check_size(made, config)
  words, section = run_folder.find_vocabulary(
    made, vocabulary or VocabularyFiles()
  )
  settings = run_config(made, section, config)
  report = made.report
  report["vocabulary"] = words.fingerprint if words else None
  if check:
    report["check"] = _forward(made.config, made.variables)
  with progress.doing(f"writing {target}"):
    run_folder.write_run(target, made, settings, words, report)
  return report


def run_config(
  made: Conversion, vocabulary: dict[str, Any], config: Any
) -> Config:
  """Returns the config of a run of converted weights."""
  if config is None:
    config = default_config(*TASKS)
    for task in TASKS:
      config.data.train[task] = train_source("shapes", task)
      config.data.evaluation[task] = evaluation_source("shapes", task)
  config = ConfigDict(config.to_dict()) if config.is_locked else config
  config.model.size = made.size
  for name, value in made.overrides.items():
    config.model[name] = value
  config.vocabulary.update(vocabulary)
  # The folder contains one set of weights, without averages.
  config.optimizer.ema_decay = 0.0
  return config


def export_official(
  source: PathLike,
  target: PathLike,
  *,
  checkpoint: str = "best",
  check: bool = False,
) -> dict[str, Any]:
  """Writes the weights of a run as an official file.

  Args:
    source: folder of a run or of converted weights.
    checkpoint: "best", "last" or a step.
    check: run a fixed request and report the results.

  Returns:
    step, sha256 (of the file), made (official tensors without counterpart in
    the run, filled with zeros and ones) and, with `check`, check.

  Raises:
    UserError: there is no such run, or the file exists or cannot be written.
  """
  run_folder.check_file_target(target)
  with progress.doing(f"reading the checkpoint of {source}"):
    config, variables, step = run_folder.read_run(source, checkpoint)
  unused, settings = run_folder.read_side(source)
  try:
    with progress.doing(f"writing {target}"):
      made = save_official(
        target, config, variables, unused=unused, settings=settings
      )
  except OSError as error:
    raise run_folder.cannot_write(target, error) from error
  report: dict[str, Any] = {
    "step": step,
    "sha256": sha256_of(target),
    "made": made,
  }
  if check:
    report["check"] = _forward(config, variables)
  return report


def _forward(config: Any, variables: Any) -> dict[str, Any]:
  with progress.doing("compiling the model and answering"):
    return forward(config, variables)


def format_import(report: dict[str, Any], target: PathLike) -> str:
  """Returns the report of an import as a few lines."""
  source, model = report["source"], report["model"]
  queries = "autoregressive"
  if model["decoder"] == "parallel":
    queries = f"{model['num_queries']} queries"
  lines = [
    f"{source['model']} weights ({source['format']} names, {source['weights']},"
    f" {report['dtype']}): {source['file']}",
    f"file       {source['bytes']:,} bytes, sha256 {source['sha256']}",
    f"model      {model['size']}, {queries}, {model['vocab_size']} ids",
    f"tensors    {len(report['tensors'])} in the file, each used once",
    f"variables  {len(report['variables'])}, each filled once,"
    f" sha256 {report['sha256']}",
  ]
  for change in report["new_or_resized"]:
    before = "new" if change["before"] is None else list(change["before"])
    lines.append(
      f"changed    {escape(change['key'])}: {before} ->"
      f" {list(change['after'])}, {change['how']}"
    )
  if report["vocabulary"] is None:
    lines.append(
      "note       without the vocabulary's files (--vocabulary=FOLDER) a run"
      " can start from this, but predict and evaluate cannot read it"
    )
  lines.append(f"wrote {target} (all of it in {run_folder.REPORT_FILE});")
  lines.append(
    f"start from it with: python -m narvl_jax.train --config=FILE.py"
    f" --workdir=RUN --config.init_from={target}"
  )
  return "\n".join(lines)


def request(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
  """Returns the fixed picture and prompt, both integers.

  Returns:
    Picture uint8 [1, 256, 256, 3], smaller if the position tables are, and ids
    int32 [1, 12] that every vocabulary has.
  """
  side = min(_SIDE, 16 * config.image_bucket_size)
  y, x, c = np.ogrid[:side, :side, :3]
  image = (3 * y + 7 * x + (x * y) // 16 + 50 * c) % 256
  ids = 4 + (np.arange(_TOKENS) * 37) % max(config.vocab_size - 5, 1)
  ids[0], ids[-1] = 0, 2
  return image[None].astype(np.uint8), ids[None].astype(np.int32)


def forward(
  config: ModelConfig, variables: Mapping[str, Any]
) -> dict[str, list[float]]:
  """Runs the fixed request in float32.

  Args:
    variables: {"params", "batch_stats"}.

  Returns:
    "encoder_out", "decoder_out" and "logits": mean, root mean square and three
    values; "best ids" of every query or, of the autoregressive decoder, of
    every token of the prompt.
  """
  image, text = request(config)
  model = make_model(config)
  decoder_input = () if config.decoder == "parallel" else (text,)

  @jax.jit
  def run(variables: Any, image: jax.Array, text: jax.Array) -> Any:
    # Inside of jit, so that only one float32 copy exists.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), variables)
    logits, parts = model.apply(wide, image, text, *decoder_input)  # pyright: ignore
    return {
      "encoder_out": parts["encoder_out"],
      "decoder_out": parts["decoder_out"],
      "logits": logits,
    }

  with jax.default_matmul_precision("highest"):
    out = jax.device_get(run(dict(variables), image, text))
  table = {}
  for name, value in out.items():
    wide = value.astype(np.float64)
    numbers = [wide.mean(), np.sqrt(np.square(wide).mean())]
    table[name] = [float(x) for x in (*numbers, *wide.reshape(-1)[:3])]
  table["best ids"] = [int(i) for i in out["logits"][0].argmax(-1)]
  return table


def format_forward(table: Mapping[str, list[float]]) -> str:
  """Returns the table as text."""
  rows: list[Sequence[str]] = [("", "mean", "rms", "[0]", "[1]", "[2]")]
  for name, values in table.items():
    if name != "best ids":
      rows.append((name, *(f"{x:.6g}" for x in values)))
  ids = " ".join(str(int(i)) for i in table["best ids"])
  return f"{format_columns(rows, rule=False)}\nbest ids  {ids}"
