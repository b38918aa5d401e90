"""The toy experiment of Revisiting OPD: how the variance of the gradient grows with gamma (arXiv 2603.25562)."""
