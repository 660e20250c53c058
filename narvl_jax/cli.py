"""What every entry point shares: flags in, one line per mistake out."""

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_dict
from ml_collections.config_flags import config_flags

from narvl_jax.disk import explain_disk
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.terminal import show, show_error

USER_ERROR_CODE = 2


def define_config_flag(name: str = "config") -> flags.FlagHolder[Any]:
  """Defines `--config=FILE.py[:ARG]` with one override flag per key."""
  return config_flags.DEFINE_config_file(
    name, None, "Experiment: FILE.py or FILE.py:ARG, passed to get_config."
  )


def run(
  main: Callable[[Sequence[str]], Any],
  *,
  positional: int | tuple[int, int] = 0,
  positional_name: str = "",
) -> NoReturn:
  """Parses the flags, runs `main` and exits.

  Mistakes of the user (`UserError`, unknown flags and config keys, values of
  the wrong type, missing files) become one line on stderr and exit code 2.

  Args:
    main: gets the name of the command and the arguments that are no flags.
    positional: number of such arguments, or the least and the largest one.
    positional_name: what they are, for messages.
  """
  least, most = (
    (positional, positional) if isinstance(positional, int) else positional
  )

  def guarded(argv: Sequence[str]) -> Any:
    if not flags.FLAGS["verbosity"].present:
      # Libraries tell of every file they touch.
      logging.set_verbosity(logging.WARNING)
    try:
      given = argv[1:]
      if len(given) > most:
        raise UserError(
          f'unexpected argument "{given[most]}"; flags start with "--"'
        )
      if len(given) < least:
        raise UserError(
          f"{positional_name or 'an argument'} is missing; --help tells more"
        )
      return main(argv)
    except UserError as error:
      fail(str(error))
    except KeyboardInterrupt:
      show("SIGINT: stopped", file=sys.stderr)
      sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
      # Nobody reads on, as after `| head`; no more is to be written at exit.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(1)
    except Exception as error:
      text = explain_disk(error)
      if text is None:
        raise
      fail(text)

  # A traceback may quote what a file holds.
  sys.excepthook = show_error
  app.run(guarded, flags_parser=_parse_flags)
  raise AssertionError("app.run returned")


def fail(message: str) -> NoReturn:
  """Prints `error: MESSAGE` as one line on stderr; exits with code 2."""
  sys.stdout.flush()
  show("error: " + " ".join(message.split()), file=sys.stderr)
  sys.exit(USER_ERROR_CODE)


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    remaining = flags.FLAGS(list(argv))
    _check_config_files()
    return remaining
  except (flags.Error, UserError) as error:
    fail(_flag_message(error))
  except Exception as error:
    # config_flags lets these escape: an override without such a key, or what
    # a config file raises.
    fail(_unknown_key(argv) or _config_file_message(error))


def _check_config_files() -> None:
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
  hint = did_you_mean(path, files) if files else ""
  return f'no config file "{path}".{hint} (--config=FILE.py[:ARG])'


def _flag_message(error: Exception) -> str:
  """Rewrites the message of a flag error as one line."""
  text = str(error)
  unknown = re.match(r"Unknown command line flag '([^']+)'", text)
  if unknown:
    name = unknown.group(1)
    own = [key for key in flags.FLAGS if flags.FLAGS[key].short_name != key]
    return f'unknown flag "--{name}".{did_you_mean(name, own)}'
  if "whilst parsing config file" in text:
    last = _end_of_traceback(text)
    if "UserError: " in last:
      return last.split("UserError: ", 1)[1]
    places = re.findall(r'File "([^"]+)", line (\d+), in get_config', text)
    where = "{}, line {}: ".format(*places[-1]) if places else ""
    return where + _without_fields(last)
  match = re.match(r"flag --([\w.]+)=(.*?): (.*)", text, re.DOTALL)
  if match and match.group(2) == "None":
    return f"flag --{match.group(1)} is required"
  if match:
    return f'--{match.group(1)}="{match.group(2)}": {match.group(3)}'
  return text


def _end_of_traceback(text: str) -> str:
  """Returns the error that a printed traceback ends in, which has no indent."""
  lines = text.strip().splitlines()
  frames = [i for i, line in enumerate(lines) if line.startswith("  File ")]
  for i in range(frames[-1] if frames else 0, len(lines)):
    if not lines[i].startswith(" "):
      return "\n".join(lines[i:])
  return lines[-1]


def _without_fields(text: str) -> str:
  """Cuts the list of all keys out of what a locked ConfigDict says."""
  missing = re.search(r'Key "(\w+)" does not exist', text)
  if missing is None:
    return text
  near = re.search(r'Did you mean "(\w+)"', text)
  hint = f' Did you mean "{near.group(1)}"?' if near else ""
  return f'no key "{missing.group(1)}".{hint}'


def _unknown_key(argv: Sequence[str]) -> str | None:
  """Returns a message if an override names a key that the config lacks."""
  config = None
  for argument in argv[1:]:
    name, _, value = argument.lstrip("-").partition("=")
    if name == "config":
      config = _load_config(value)
    elif name.startswith("config.") and config is not None:
      message = unknown_path(config, name.removeprefix("config."))
      if message:
        return message
  return None


def _load_config(argument: str) -> config_dict.ConfigDict | None:
  try:
    config = config_flags.ConfigFileFlagParser("config").parse(argument)
  except Exception:
    return None
  return config if isinstance(config, config_dict.ConfigDict) else None


def unknown_path(config: config_dict.ConfigDict, path: str) -> str | None:
  """Returns what is wrong with a dotted key, None if it exists.

  Args:
    config: the config that should have the key.
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
      where = f' in "{prefix}"' if prefix else ""
      return f'unknown config key "{path}": no "{part}"{where}.{near}'
    node = node[part]
    prefix = f"{prefix}.{part}" if prefix else part
  return None


def _config_file_message(error: Exception) -> str:
  """Names the line of the config file that raised `error`."""
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
