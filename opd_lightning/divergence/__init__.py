"""Divergences between student and teacher, the choice of the top-k estimator and of regularizers."""
