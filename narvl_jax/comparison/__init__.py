"""The parallel model against its autoregressive counterpart; see README.md."""
