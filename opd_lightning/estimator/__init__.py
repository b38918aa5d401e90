"""Estimators: how the objective becomes a loss per token."""
