"""A digest of a file's content that reads little of a large file.

Size and modification time do not identify a content: `cp -p`, `rsync -t` and
`touch -r` keep the time. Files of up to 16 MiB are read as a whole. Of larger
ones 64 blocks of 64 KiB are read at equal distances, the first and the last of
the file included. A change between two blocks that moves nothing is missed.
"""

import hashlib
from collections.abc import Callable

DIGEST_BYTES = 16
WHOLE_BYTES = 1 << 24
SAMPLES = 64
SAMPLE_BYTES = 1 << 16
# In a fingerprint, separates the digest of names, sizes and times of files from
# that of contents.
CONTENT_MARK = ":"


def content_digest(read: Callable[[int, int], bytes], size: int) -> bytes:
  """Returns 16 bytes that identify the content of a file.

  Args:
    read: position, number of bytes -> the bytes, fewer at the end of the file.
  """
  digest = hashlib.blake2b(str(size).encode(), digest_size=DIGEST_BYTES)
  if size <= WHOLE_BYTES:
    places = range(0, size, SAMPLE_BYTES)
  else:
    last = size - SAMPLE_BYTES
    places = [i * last // (SAMPLES - 1) for i in range(SAMPLES)]
  for place in places:
    digest.update(read(place, min(SAMPLE_BYTES, size - place)))
  return digest.digest()
