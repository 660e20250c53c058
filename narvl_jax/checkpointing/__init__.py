"""Checkpoints of a run: `WORKDIR/checkpoints/STEP`, see docs/checkpoints.md.

| you want to change | look in |
| --- | --- |
| saving in the background, failed saves | `writing` (class `Checkpoints`) |
| restoring arrays | `reading` (its base class) |
| how Orbax is set up | `orbax_manager`, `host_memory` |
| what is stored beside the arrays | `record` |
| record against config, vocabulary, model | `record_checks` |
| detection of damage | `integrity`; `checksums` (arrays), `digests` (files) |
| which checkpoints are kept; best, last, STEP | `retention`; `chosen` |
| loading a trained run; weights of another run | `runs`; `weights` |
"""
