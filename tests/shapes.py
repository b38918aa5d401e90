"""The run-time checker of shapes and types: ``pytest --jaxtyping-packages=opd_lightning,shapes.check``."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# An int is a float to a type checker (PEP 484), and so it is here.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
