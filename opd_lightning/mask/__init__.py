"""Masks: response tokens that teach nothing."""
