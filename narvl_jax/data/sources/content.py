"""Whether a file still holds what it did, told without reading all of it.

Size and modification time do not tell: `cp -p`, `rsync -t` and `touch -r` keep
the time, and another content may have the same size.

Of a file of up to 16 MiB all is read, so that no change is missed. Of a larger
one 64 blocks of 64 KiB are read, the first and the last of the file and others
at equal distances. A change that lies between two of these blocks and moves
nothing behind it is missed; it needs the same size and modification time, too.
"""

import hashlib
import os

DIGEST_BYTES = 16
WHOLE_BYTES = 1 << 24
SAMPLES = 64
SAMPLE_BYTES = 1 << 16


def content_digest(fd: int, size: int) -> bytes:
  """Returns 16 bytes that differ when the content does.

  Args:
    fd: the file, open for reading.
    size: of the file, in bytes.
  """
  digest = hashlib.blake2b(str(size).encode(), digest_size=DIGEST_BYTES)
  if size <= WHOLE_BYTES:
    places = range(0, size, SAMPLE_BYTES)
  else:
    last = size - SAMPLE_BYTES
    places = [i * last // (SAMPLES - 1) for i in range(SAMPLES)]
  for place in places:
    end = min(place + SAMPLE_BYTES, size)
    # A network drive may give less at a time.
    while place < end and (part := os.pread(fd, end - place, place)):
      digest.update(part)
      place += len(part)
  return digest.digest()
