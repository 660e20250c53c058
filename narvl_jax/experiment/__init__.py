"""The config of an experiment, and the objects that it describes."""
