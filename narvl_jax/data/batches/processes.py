"""What processes that work for a main one have in common."""

import os
import threading
import time

_CHECK_SECONDS = 0.5


def exit_with_parent(parent: int) -> None:
  """Ends this process, from a thread, when process `parent` is gone.

  A main process that was killed cannot tell its workers to end.
  """
  threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
  while os.getppid() == parent:
    time.sleep(_CHECK_SECONDS)
  os._exit(1)
