"""opd_lightning: modular on-policy distillation of language models on Lightning."""

__version__ = "0.1.0"
