"""Reductions: each token's share of the loss over one optimizer step."""
