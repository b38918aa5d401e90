"""Going on with a run that was cut off: what its checkpoints hold, how they are written, and how one is found."""
