"""Rewards of a taken token, for the score-function estimators."""
