r"""Counts the pictures of a corpus in which each n-gram occurs, for CIDEr-D.

  python -m narvl_jax.document_frequencies captions_train2014.json \
    --to=coco_train.tsv.gz
  python -m narvl_jax.document_frequencies SPEC --split=train --to=df.tsv.gz

The source is a JSON file of COCO captions, or a data set SPEC of captions as
for `narvl_jax.check_data`: a file `*.tsv` or `*.jsonl`, a folder of ArrayRecord
shards, `tfds:NAME` or the name of a source.

CIDEr-D gives rare n-grams more weight. By default their frequency is counted in
the references of the evaluated pictures. With the file that this command
writes, results of small subsets and of different splits are comparable.
"""

import pathlib
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_output_file
from narvl_jax.data import sources
from narvl_jax.data.captions import coco_captions, source_captions
from narvl_jax.errors import UserError
from narvl_jax.metrics import tokenizers
from narvl_jax.metrics.cider import DocumentFrequencies
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import show

_TASK = "caption"


def document_frequencies(
  spec: str,
  to: str,
  *,
  tokenizer: str = "auto",
  split: str = "",
  max_examples: int = 0,
) -> DocumentFrequencies:
  """Counts n-grams of captions and writes the file.

  Args:
    spec: a JSON file of COCO captions, or see `sources.open_source`.
    to: file to write, compressed if its name ends in `.gz`.
    tokenizer: "ptb" (needs Java), "simple", or "auto": "ptb" where it works.
    split: split of `spec`.
    max_examples: number of records to read, from the first; 0 reads all.

  Raises:
    UserError: the source has no captions or cannot be read, the tokenizer is
      missing, or the file cannot be written.
  """
  name = _tokenizer(tokenizer)
  captions = _captions(spec, split, max_examples)
  texts = [text for given in captions for text in given]
  if not texts:
    raise UserError(f'"{spec}" has no captions; choose another split (--split)')
  with progress.doing(f"splitting {len(texts):,} captions into words"):
    split_texts = iter(getattr(tokenizers, name)(texts))
  with progress.doing("counting", len(captions), "pictures") as counting:

    def documents() -> Iterator[list[str]]:
      for given in captions:
        yield [next(split_texts) for _ in given]
        counting.advance()

    found = DocumentFrequencies.of(documents(), name)
  with progress.doing(f"writing {len(found.counts):,} n-grams"):
    found.save(to)
  show(
    f"{found.documents:,} pictures, {len(texts):,} captions,"
    f" {len(found.counts):,} n-grams of 1 to 4 words ({name} tokenizer) in {to}"
  )
  setting = "--metrics=all " if name == "ptb" else ""
  show(
    "CIDEr-D weights n-grams by how rare they are in this corpus if evaluate"
    f" gets the file: {setting}--cider_df={to}"
  )
  return found


def _tokenizer(name: str) -> str:
  reason = tokenizers.why_no_ptb() if name != "simple" else ""
  if name == "ptb" and reason:
    raise UserError(
      f"--tokenizer=ptb: {reason}; or use --tokenizer=simple, whose figures do"
      " not compare with published ones"
    )
  if name == "auto" and reason:
    show(
      f"note: --tokenizer=simple, since there is no ptb ({reason}); its figures"
      " do not compare with published ones",
      file=sys.stderr,
    )
  return "simple" if reason or name == "simple" else "ptb"


def _captions(spec: str, split: str, max_examples: int) -> list[list[str]]:
  """Returns the captions of each picture."""
  if spec.endswith(".json"):
    if split or max_examples:
      raise UserError(
        f'"{spec}" is read whole; leave out --split and --max_examples'
      )
    with progress.doing(f"reading {spec}"):
      return [*coco_captions(spec).values()]
  note = sources.unused_split(spec, split)
  if note:
    show(f"note: {note}", file=sys.stderr)
  source = sources.open_source(spec, task=_TASK, split=split)
  return [*source_captions(source, max_examples=max_examples).values()]


def define_flags() -> None:
  """Defines the flags of the command."""
  common_flags.to("File to write, *.tsv.gz.")
  flags.DEFINE_enum(
    "tokenizer",
    "auto",
    ["auto", "ptb", "simple"],
    "Tokenizer of captions: ptb as in papers (needs Java), simple, or auto: ptb"
    " where it works.",
  )
  common_flags.split("Split to read.")
  common_flags.max_examples(
    "Read only the first records; 0: all.", 0, lower_bound=0
  )


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  options = flags.FLAGS
  if options.to is None:
    raise UserError("--to=FILE.tsv.gz is missing: where to write")
  if pathlib.Path(options.to).suffix not in (".gz", ".tsv"):
    raise UserError(f'--to="{options.to}" must be a file *.tsv.gz or *.tsv')
  check_output_file("to", options.to)
  document_frequencies(
    argv[1],
    options.to,
    tokenizer=options.tokenizer,
    split=options.split,
    max_examples=options.max_examples,
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=1, positional_name="the source of the captions")
