"""Messages for mistakes on a command line or in a config file."""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import config_dict
from ml_collections.config_flags import config_flags

from narvl_jax.command_line.config_names import config_names
from narvl_jax.command_line.flag_parsing import has_config, own_flags
from narvl_jax.errors import UserError, did_you_mean

# Least similarity of a suggestion.
_NEAR = 0.75
# Name in other projects -> name here.
_SYNONYMS = {
  "epochs": "steps",
  "max_steps": "steps",
  "output_dir": "workdir",
  "model_dir": "workdir",
  "ckpt": "checkpoint",
  "limit": "max_examples",
  "num_examples": "max_examples",
  "output": "to",
  "gpus": "mesh",
}
# Part of a message of a flag parser -> plain reason.
_REASONS = {
  "invalid literal for int()": "not a whole number",
  "could not convert string to float": "not a number",
  "Non-boolean argument": "neither true nor false",
  "Error while parsing string": "not a tuple in Python's notation",
  "as a ConfigDict": "not a section of settings",
}


def check_config_files() -> None:
  """Raises `UserError` for a config file that could not be read."""
  for name in flags.FLAGS:
    flag = flags.FLAGS[name]
    if not config_flags.is_config_flag(flag) or flag.value is None:
      continue
    if not isinstance(flag.value, config_dict.ConfigDict):
      raise UserError(_missing_file(config_flags.get_config_filename(flag)))


def _missing_file(argument: str) -> str:
  path = argument.split(":", 1)[0]
  folder = os.path.dirname(path) or "."
  files = []
  if os.path.isdir(folder):
    files = [
      os.path.join(folder, name) if os.path.dirname(path) else name
      for name in os.listdir(folder)
      if name.endswith(".py") and not name.startswith("_")
    ]
  if os.path.basename(path) == path and not path.endswith(".py"):
    files = config_names()
  hint = did_you_mean(path, files) if files else ""
  return f'no config file "{path}".{hint} (--config=NAME or FILE.py[:ARG])'


def flag_message(error: Exception, argv: Sequence[str]) -> str:
  """Rewrites the message of a flag error as one line."""
  text = str(error)
  unknown = re.match(r"Unknown command line flag '([^']+)'", text)
  if unknown:
    return _unknown_flag(unknown.group(1), argv)
  missing = re.match(r"Missing value for flag --?([\w.]+)", text)
  if missing:
    return f"--{missing.group(1)} has no value: --{missing.group(1)}=VALUE"
  if "whilst parsing config file" in text:
    last = _end_of_traceback(text)
    if "UserError: " in last:
      return last.split("UserError: ", 1)[1]
    places = re.findall(r'File "([^"]+)", line (\d+), in get_config', text)
    where = "{}, line {}: ".format(*places[-1]) if places else ""
    return where + _without_fields(last)
  match = re.match(r"flag --([\w.]+)=(.*?): (.*)", text, re.DOTALL)
  if match and match.group(2) == "None":
    text = f"flag --{match.group(1)} is required"
    if argv[1:] and not argv[1].startswith("-"):
      # Its value may have been given without the name.
      text += f"; {unexpected_argument(argv[1], argv)}"
    return text
  if match:
    name, value, reason = match.groups()
    return f'--{name}="{value}": {_wrong_value(name, reason, argv)}'
  return text


def _wrong_value(name: str, reason: str, argv: Sequence[str]) -> str:
  """Returns why a value is invalid."""
  known = [text for part, text in _REASONS.items() if part in reason]
  path = name.removeprefix("config.")
  if path == name:
    return known[0] if known else reason
  value: Any = _given_config(argv)
  for key in path.split("."):
    value = None if value is None else value.get(key)
  if isinstance(value, config_dict.ConfigDict):
    key = next(iter(value), "KEY")
    return (
      "this is a section of settings; set one of its keys, such as"
      f" --{name}.{key}={value.get(key)}"
    )
  if not known:
    return reason
  return known[0] + ("" if value is None else f"; the config has {value!r}")


def _unknown_flag(name: str, argv: Sequence[str]) -> str:
  near = near_flags(name, argv)
  hint = "--help lists the flags of this command"
  if near:
    hint = "Did you mean " + " or ".join(f'"--{x}"' for x in near) + "?"
  return f'unknown flag "--{name}". {hint}'


def near_flags(name: str, argv: Sequence[str]) -> list[str]:
  """Returns flags and config keys that resemble a name.

  Args:
    name: without dashes, such as "lr".
    argv: the command line, which may contain a config.

  Returns:
    At most three names, best first, such as "config.optimizer.learning_rate".
  """
  options = [flag.name for flag in own_flags()]
  if has_config():
    # This imports jax, which some commands do not need.
    from narvl_jax.experiment.config import default_config

    config = _given_config(argv) or default_config()
    options += [f"config.{path}" for path in _paths(config)]
  return _nearest(name, options)


def _nearest(name: str, options: Iterable[str]) -> list[str]:
  wanted = name.replace("-", "_").removeprefix("config.").lower()
  wanted = _SYNONYMS.get(wanted, wanted)
  # Prefers flags of the command, and keys with few parts.
  scored = sorted(
    (
      -_score(wanted, option),
      option.count("."),
      "train." not in option,
      number,
      option,
    )
    for number, option in enumerate(options)
  )
  best = scored[0][0] if scored else 0.0
  # An exact match makes similar names irrelevant.
  least = -best if -best >= 0.9 else _NEAR
  return [option for score, *_, option in scored if -score >= least][:3]


def _score(wanted: str, option: str) -> float:
  """Returns the similarity of an option, from 0 to 1."""
  path = option.removeprefix("config.")
  last = path.rsplit(".", 1)[-1]
  if wanted in (path, last):
    return 1.0
  if len(wanted) > 1 and wanted == "".join(x[:1] for x in last.split("_")):
    return 0.95

  def ratio(text: str) -> float:
    return difflib.SequenceMatcher(None, wanted, text).ratio()

  parts = max(map(ratio, last.split("_")))
  # A match of a part counts less than one of the whole.
  return max(ratio(path), ratio(last), 0.85 * parts)


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
  for key in node:
    yield prefix + key
    value = node.get(key)
    if isinstance(value, config_dict.ConfigDict):
      yield from _paths(value, f"{prefix}{key}.")


def unexpected_argument(argument: str, argv: Sequence[str]) -> str:
  """Returns a message for an argument that the command does not accept."""
  text = f'unexpected argument "{argument}"; flags start with "--"'
  before = argv[argv.index(argument) - 1] if argument in argv else ""
  flag = before.lstrip("-").removeprefix("no")
  if before.startswith("-") and "=" not in before and flag in flags.FLAGS:
    return (
      f'unexpected argument "{argument}"; --{flag} takes its value after "=":'
      f" --{flag}={argument}"
    )
  name, equals, value = argument.partition("=")
  if equals:
    near = near_flags(name, argv)
    if near:
      return f'{text}. Did you mean "--{near[0]}={value}"?'
  own = {flag.name for flag in own_flags()}
  if "config" in own and argument.split(":", 1)[0].endswith(".py"):
    return f'{text}. Did you mean "--config={argument}"?'
  if "workdir" in own and os.path.isdir(argument):
    return f'{text}. Did you mean "--workdir={argument}"?'
  return text


def memory_message(error: Exception) -> str | None:
  """Returns a message if a device has too little memory, otherwise None."""
  text = str(error)
  # Not by its class: commands that need no jax do not import it.
  if type(error).__name__ != "JaxRuntimeError":
    return None
  if not text.startswith("RESOURCE_EXHAUSTED"):
    return None
  fewer = "a smaller --batch_size or " if "batch_size" in flags.FLAGS else ""
  return (
    f"out of memory ({text.splitlines()[0].rstrip('.')}); use {fewer}devices"
    " with more memory"
  )


def _end_of_traceback(text: str) -> str:
  """Returns the last lines of a traceback: the error, without indent."""
  lines = text.strip().splitlines()
  frames = [i for i, line in enumerate(lines) if line.startswith("  File ")]
  for i in range(frames[-1] if frames else 0, len(lines)):
    if not lines[i].startswith(" "):
      return "\n".join(lines[i:])
  return lines[-1]


def _without_fields(text: str) -> str:
  """Removes the list of all keys from the message of a locked ConfigDict."""
  missing = re.search(r'Key "(\w+)" does not exist', text)
  if missing is None:
    return text
  near = re.search(r'Did you mean "(\w+)"', text)
  hint = f' Did you mean "{near.group(1)}"?' if near else ""
  return f'no key "{missing.group(1)}".{hint}'


def unknown_key(argv: Sequence[str]) -> str | None:
  """Returns a message if an override has an unknown key."""
  config = None
  for argument in argv[1:]:
    name, _, value = argument.lstrip("-").partition("=")
    if name == "config":
      config = load_config(value)
    elif name.startswith("config.") and config is not None:
      message = unknown_path(config, name.removeprefix("config."))
      if message:
        return message
  return None


def _given_config(argv: Sequence[str]) -> config_dict.ConfigDict | None:
  """Returns the config of a command line; None if there is no readable one."""
  for number, argument in enumerate(argv):
    name, equals, value = argument.lstrip("-").partition("=")
    if name == "config" and argument.startswith("-"):
      following = argv[number + 1] if number + 1 < len(argv) else ""
      return load_config(value if equals else following)
  return None


def load_config(argument: str) -> config_dict.ConfigDict | None:
  """Returns the config of `FILE.py:ARG`; None if it cannot be read."""
  try:
    config = config_flags.ConfigFileFlagParser("config").parse(argument)
  except Exception:
    return None
  return config if isinstance(config, config_dict.ConfigDict) else None


def unknown_path(config: config_dict.ConfigDict, path: str) -> str | None:
  """Returns a message for an unknown dotted key; None if it exists.

  Args:
    config: the config to search.
    path: such as `optimizer.learning_rate`.
  """
  node: Any = config
  prefix = ""
  for part in path.split("."):
    if not isinstance(node, config_dict.ConfigDict):
      return (
        f'config key "{prefix}" is a value ({node!r}) and has no "{part}";'
        f" set it with --config.{prefix}="
      )
    if part not in node:
      near = did_you_mean(part, node.keys()) if len(node) else " It is empty."
      elsewhere = _nearest(path.rsplit(".", 1)[-1], _paths(config))
      if elsewhere and (" Valid:" in near or " It is empty" in near):
        near = " Did you mean " + " or ".join(f'"{x}"' for x in elsewhere) + "?"
      where = f' in "{prefix}"' if prefix else ""
      return f'unknown config key "{path}": no "{part}"{where}.{near}'
    node = node[part]
    prefix = f"{prefix}.{part}" if prefix else part
  return None


def config_file_message(error: Exception) -> str:
  """Returns a message with the line of the config file that raised `error`."""
  frames = traceback.extract_tb(error.__traceback__)
  for argument in sys.argv[1:]:
    name, _, value = argument.lstrip("-").partition("=")
    path = os.path.abspath(value.split(":", 1)[0])
    if name != "config":
      continue
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
      return f"{error.filename}, line {error.lineno}: {kind}: {error.msg}"
    for frame in reversed(frames):
      if os.path.abspath(frame.filename) == path:
        text = error.args[0] if error.args else error
        text = _without_fields(f"{kind}: {text}")
        return f"{value}, line {frame.lineno}: {text}"
    if isinstance(error, OSError):
      return _missing_file(value)
  raise error
