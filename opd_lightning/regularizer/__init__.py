"""Regularizers: what adds to the value of a loss, or scales its weight."""
