"""Supports: which token ids are compared at a position."""
