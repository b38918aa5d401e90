"""Rollout samplers: how responses come about."""
