"""Runs a stand-in for a store: python -m tests.stores gs --latency_ms=20.

Prints the variables to set and the address of a bucket.
"""

import argparse
import threading

from tests.stores import servers


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("scheme", choices=("gs", "s3"))
  parser.add_argument("--latency_ms", type=float, default=0.0)
  parser.add_argument("--port", type=int, default=0)
  options = parser.parse_args()
  with servers.serving(options.scheme, options.port) as store:
    for name, value in store.environment.items():
      print(f"export {name}={value}")
    print(f"# {store.make_bucket()}", flush=True)
    store.faults.latency = options.latency_ms / 1000
    threading.Event().wait()


if __name__ == "__main__":
  main()
