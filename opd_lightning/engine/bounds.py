"""How far generation may run ahead of training."""

from __future__ import annotations

from opd_lightning.errors import require


def check_ahead(ahead: object) -> None:
    """Raise ConfigError unless ``ahead`` is a number of collections that can be written before they are needed."""
    known = ahead in (0, 1) and not isinstance(ahead, bool)
    remedy = "use 0 for responses of the current weights, 1 for those of one collection before"
    require(known, "engine.ahead", "be 0 or 1", ahead, remedy)
