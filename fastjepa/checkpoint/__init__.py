"""Checkpoints: the format, writing, saving in the background, restoring, resuming."""
