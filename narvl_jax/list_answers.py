"""Writes the answers of a data set, one a line, the most frequent first.

  python -m narvl_jax.list_answers SPEC --to=answers.txt [--max_answers=3129]

SPEC is a data set as for `narvl_jax.check_data`: a file `*.tsv` or `*.jsonl`, a
folder of ArrayRecord shards, `tfds:NAME` or the name of a source.
"""

import sys
from collections.abc import Sequence

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.data import sources
from narvl_jax.data.answers import ANSWERS_SETTING, collect_answers
from narvl_jax.data.example import TASKS
from narvl_jax.errors import UserError
from narvl_jax.files.disk import write_text
from narvl_jax.files.paths import check_file
from narvl_jax.files.stores import as_path, is_remote
from narvl_jax.terminal.text import show


def define_flags() -> None:
  """Defines the flags of the command."""
  common_flags.to("File to write, *.txt.", "")
  common_flags.choice("task", "", TASKS, "Task of the records.")
  common_flags.split("Split to read.")
  flags.DEFINE_integer(
    "max_answers", 0, "Keep only the most frequent; 0: all.", lower_bound=0
  )
  common_flags.max_examples(
    "Read only the first records; 0: all.", 0, old="max_records", lower_bound=0
  )


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  options = flags.FLAGS
  target = as_path(options.to)
  if target.suffix != ".txt":
    raise UserError(f'--to="{options.to}" must be a file *.txt')
  if not is_remote(target) and not target.parent.is_dir():
    raise UserError(f'--to="{target}" is in no folder; create it first')
  check_file("--to", target)
  note = sources.unused_split(argv[1], options.split)
  if note:
    show(f"note: {note}", file=sys.stderr)
  source = sources.open_source(argv[1], task=options.task, split=options.split)
  task = options.task or getattr(source, "task", "") or source[0].task
  counts = collect_answers(source, task, max_examples=options.max_examples)
  kept = list(counts)[: options.max_answers or None]
  write_text(target, "".join(f"{answer}\n" for answer in kept))
  share = sum(counts[answer] for answer in kept) / sum(counts.values())
  show(
    f"{len(kept):,} of {len(counts):,} answers, {share:.1%} of all occurrences,"
    f" in {target}; use them by {ANSWERS_SETTING}={target} in training, or by"
    f" --answers={target}"
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=1, positional_name="the source of the answers")
