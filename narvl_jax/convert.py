"""Converts official weights to a run folder, and back.

python -m narvl_jax.convert --from=ofa_base.pt --to=DIR [--vocabulary=FOLDER]
    [--config=configs/FILE.py] [--num_queries=N] [--check]
    [--decoder=autoregressive]
python -m narvl_jax.convert --from=RUN --to=official.pt

`--from` is an official file of OFA or NARVL (any size, float32 or half), or a
folder of the Hugging Face port. No code in it is executed. OFA becomes a NARVL
with new queries; with --decoder=autoregressive it keeps its decoder. DIR
becomes a run folder: `train --config.init_from=DIR` starts from it; `evaluate`
and `predict` accept it if it has the files of the vocabulary. DIR/report.json
lists where every tensor was stored. Converting back restores every bit.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.errors import UserError
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.text import show

_OFFICIAL_SUFFIXES = (".pt", ".pth")
# Suffixes of weights that the official code does not write.
_OTHER_SUFFIXES = (".bin", ".ckpt", ".npz", ".safetensors")
# Flags of one of the two directions only.
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
  flags.DEFINE_bool("ema", False, "Convert the moving averages of the file.")
  common_flags.choice(
    "decoder",
    None,
    ("parallel", "autoregressive"),
    "Model for weights of OFA: parallel, a NARVL (the default), or"
    " autoregressive, unchanged.",
  )
  _define_number(
    "num_queries", None, "Queries: those of the file are kept, cut, extended."
  )
  common_flags.choice(
    "blank_row", "noise", ("noise", "mean", "unk"), "Initial row of the blank."
  )
  flags.DEFINE_list(
    "stretch_images",
    None,
    "FROM,TO: stretch image positions from one side in pixels to another.",
  )
  _define_number("seed", 0, "Seed of new parameters.")
  common_flags.checkpoint(text="Checkpoint of a run: ")
  flags.DEFINE_bool("check", False, "Print the outputs for a fixed request.")
  flags.mark_flags_as_required(["from", "to"])


class _NumberParser(flags.IntegerParser):
  """Parses whole numbers; the error is in plain words."""

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
      f" valid: --to={as_path(target).with_suffix('.pt')}"
    )
  to_file = suffix in _OFFICIAL_SUFFIXES
  for name in _IMPORT_FLAGS if to_file else _EXPORT_FLAGS:
    if values[name].present:
      raise UserError(
        f"--{name} has no meaning where --to={target} is a"
        f" {'file' if to_file else 'folder'}; leave it out"
      )
  # Imported here, so that --help is fast.
  from narvl_jax.interop import transfer

  if to_file:
    report = transfer.export_official(
      source, target, checkpoint=values.checkpoint, check=values.check
    )
    if report["made"]:
      show(
        f"note: {len(report['made'])} tensors without influence on the outputs"
        " are not part of this model and were filled with zeros and ones"
      )
    show(f"wrote {target}: step {report['step']}, sha256 {report['sha256']}")
  else:
    report = transfer.import_official(
      source,
      target,
      options=transfer.Options(
        decoder=values.decoder,
        num_queries=values.num_queries,
        blank_row=values.blank_row,
        stretch_images=_stretched(values.stretch_images),
        seed=values.seed,
      ),
      ema=values.ema,
      vocabulary=transfer.VocabularyFiles(
        values.vocabulary, values.num_codes, values.num_bins
      ),
      config=values.config,
      check=values.check,
    )
    show(transfer.format_import(report, target))
  if "check" in report:
    show(transfer.format_forward(report["check"]))
  sys.stdout.flush()


def _stretched(sides: Sequence[str] | None) -> tuple[int, int] | None:
  """Returns the two sides of --stretch_images."""
  if not sides:
    return None
  try:
    before, after = map(int, sides)
  except ValueError as error:
    raise UserError(
      f"--stretch_images={','.join(sides)} is not two sides in pixels, such as"
      " --stretch_images=512,1024"
    ) from error
  return before, after


if __name__ == "__main__":
  define_flags()
  cli.run(main)
