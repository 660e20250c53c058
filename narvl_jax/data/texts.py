"""Which texts can be tokenised."""

from narvl_jax.errors import UserError

# Far beyond any prompt or answer; tokenising as much takes half a second.
_LONGEST_TEXT = 1_000_000


def checked_text(text: str) -> str:
  """Returns the text if it can be tokenised.

  Raises:
    UserError: it holds half of a surrogate pair, which is no character, or it
      is so long that this would take minutes.
  """
  if len(text) > _LONGEST_TEXT:
    raise UserError(
      f"the text has {len(text):,} characters, the limit is {_LONGEST_TEXT:,}:"
      " no prompt and no answer is that long"
    )
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise UserError(
      f"the text has half of a surrogate pair, \\u{ord(text[e.start]):04x}, as"
      f" its character {e.start + 1}; no token stands for it: save the text as"
      " UTF-8 again"
    ) from e
  return text
