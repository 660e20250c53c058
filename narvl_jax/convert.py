"""Turns official weights into a run folder, and back.

python -m narvl_jax.convert --from=ofa_base.pt --to=DIR [--vocabulary=FOLDER]
    [--config=configs/FILE.py] [--num_queries=N] [--check]
    [--decoder=autoregressive]
python -m narvl_jax.convert --from=RUN --to=official.pt

`--from` is an official file of OFA or NARVL (any size, float32 or half), or a
folder of the Hugging Face port. Nothing in it is run. OFA becomes a NARVL with
new queries, or stays the autoregressive model that it is if asked to. DIR is a
run folder: `train --config.init_from=DIR` starts from it; with the files of the
vocabulary `evaluate` and `predict` read it, too. DIR/report.json tells where
every tensor went. The way back is bit by bit the same.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.data.example import TASKS
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import (
  Config,
  default_config,
  evaluation_source,
  train_source,
)
from narvl_jax.interop import run_folder
from narvl_jax.interop.adapt import BLANK_ROWS, Options, with_config
from narvl_jax.interop.check_forward import format_forward, forward
from narvl_jax.interop.conversion import Conversion, convert_official
from narvl_jax.interop.export import save_official
from narvl_jax.interop.source_file import file_hash
from narvl_jax.interop.tensors import PathLike
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import escape, show

_OFFICIAL_SUFFIXES = (".pt", ".pth")
# Of files, but not of those that the official code writes.
_OTHER_SUFFIXES = (".bin", ".ckpt", ".npz", ".safetensors")
# Flags that only one of the two directions reads.
_IMPORT_FLAGS = (
  "config",
  "vocabulary",
  "num_codes",
  "num_bins",
  "ema",
  "decoder",
  "num_queries",
  "blank_row",
  "stretch_images",
  "seed",
)
_EXPORT_FLAGS = ("checkpoint",)


def import_official(
  source: PathLike,
  target: PathLike,
  *,
  options: Options | None = None,
  ema: bool = False,
  vocabulary: PathLike | None = None,
  num_codes: int | None = None,
  num_bins: int | None = None,
  config: Any = None,
  check: bool = False,
) -> dict[str, Any]:
  """Writes official weights as a run folder.

  Args:
    source: file or Hugging Face folder.
    target: the run folder, new or empty.
    options: what is new or resized, and how.
    ema: take the moving averages of the file.
    vocabulary: folder of the vocabulary's files; None looks beside the
      weights.
    num_codes: image codes of the vocabulary; None: as the file says.
    num_bins: coordinate bins of the vocabulary; None: as the file says.
    config: of the run; None: all tasks, and made up scenes as data. Its size
      must be that of the weights, its decoder and its number of queries are
      taken; what else the weights determine is set here.
    check: run a fixed request and report what comes out.

  Returns:
    The report, as in `report.json`.

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
    made, vocabulary, num_codes, num_bins
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
  # There is one set of weights in the folder.
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
    target: the file, which must not exist.
    checkpoint: "best", "last" or a step.
    check: run a fixed request and report what comes out.

  Returns:
    step, sha256 (of the file), made (official tensors that the run knows
    nothing of, filled with zeros and ones) and, if asked for, check.

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
    "sha256": file_hash(target),
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


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("from", None, "Official file or folder, or a run.")
  common_flags.to("Folder of the run, or official FILE.pt.")
  cli.define_config_flag()
  flags.DEFINE_string(
    "vocabulary",
    None,
    "Folder of dict.txt, encoder.json and vocab.bpe, or of vocab.json and"
    " merges.txt; by default that of --from.",
  )
  _define_number("num_codes", None, "Image codes of the vocabulary.")
  _define_number("num_bins", None, "Coordinate bins of the vocabulary.")
  flags.DEFINE_bool("ema", False, "Take the moving averages of the file.")
  flags.DEFINE_string(
    "decoder",
    None,
    "What OFA becomes: parallel, a NARVL (the default), or autoregressive, as"
    " it is.",
  )
  _define_number(
    "num_queries", None, "Queries: those of the file are kept, cut, extended."
  )
  flags.DEFINE_string(
    "blank_row", "noise", f"What the blank starts as: {', '.join(BLANK_ROWS)}."
  )
  flags.DEFINE_list(
    "stretch_images",
    None,
    "FROM,TO: stretch image positions from one side in pixels to another.",
  )
  _define_number("seed", 0, "Of all that is new.")
  common_flags.checkpoint(text="Of a run: ")
  flags.DEFINE_bool("check", False, "Answer a fixed request, print numbers.")
  flags.mark_flags_as_required(["from", "to"])


class _NumberParser(flags.IntegerParser):
  """Whole numbers, and what is wrong with others in words of ours."""

  def convert(self, argument: Any) -> int:
    """Returns the number."""
    try:
      return super().convert(argument)
    except (TypeError, ValueError) as error:
      raise ValueError("not a whole number, such as 5") from error


def _define_number(name: str, default: int | None, text: str) -> None:
  flags.DEFINE(
    _NumberParser(), name, default, text, serializer=flags.ArgumentSerializer()
  )


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  values = flags.FLAGS
  source: Any = values["from"].value
  target: Any = values.to
  suffix = pathlib.Path(target).suffix
  if suffix in _OTHER_SUFFIXES:
    raise UserError(
      f"--to={target}: official files are of torch and end in .pt; nearest"
      f" valid: --to={pathlib.Path(target).with_suffix('.pt')}"
    )
  to_file = suffix in _OFFICIAL_SUFFIXES
  for name in _IMPORT_FLAGS if to_file else _EXPORT_FLAGS:
    if values[name].present:
      raise UserError(
        f"--{name} has no meaning where --to={target} is a"
        f" {'file' if to_file else 'folder'}; leave it out"
      )
  if to_file:
    report = export_official(
      source, target, checkpoint=values.checkpoint, check=values.check
    )
    if report["made"]:
      show(
        f"note: {len(report['made'])} tensors that no answer depends on are not"
        " known here and were filled with zeros and ones"
      )
    show(f"wrote {target}: step {report['step']}, sha256 {report['sha256']}")
  else:
    report = import_official(
      source,
      target,
      options=_options(values),
      ema=values.ema,
      vocabulary=values.vocabulary,
      num_codes=values.num_codes,
      num_bins=values.num_bins,
      config=values.config,
      check=values.check,
    )
    show(format_import(report, target))
  if "check" in report:
    show(format_forward(report["check"]))
  sys.stdout.flush()


def _options(values: flags.FlagValues) -> Options:
  """Returns the choices on the command line."""
  pixels = None
  if values.stretch_images:
    try:
      before, after = map(int, values.stretch_images)
    except ValueError as error:
      given = ",".join(values.stretch_images)
      raise UserError(
        f"--stretch_images={given} is not two sides in pixels, such as"
        " --stretch_images=512,1024"
      ) from error
    pixels = (before, after)
  return Options(
    decoder=values.decoder,
    num_queries=values.num_queries,
    blank_row=values.blank_row,
    stretch_images=pixels,
    seed=values.seed,
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main)
