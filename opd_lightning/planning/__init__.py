"""What a run will cost, from shapes and settings alone: memory by part, tokens, arithmetic and hours."""
