"""What is refused before a model is loaded: a small function a check; settings, configurations, tokenizers alone."""
