"""A frozen causal language model in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from opd_lightning.errors import require
from opd_lightning.loading import FrozenScorer, Loading
from opd_lightning.protocols import Scoring
from opd_lightning.serving.identity import weights_digest
from opd_lightning.teacher.cached import cached
from opd_lightning.teacher.offloaded import Offload, OffloadedScorer
from opd_lightning.teacher.quantized import configured
from opd_lightning.teacher.sharded import ShardedScorer

__all__ = ["FrozenScorer", "LocalTeacher"]


@dataclass(frozen=True, kw_only=True)
class LocalTeacher:
    """Names a teacher that transformers can load, by folder or hub name.

    Args:
        path: folder, hub name, or ``builtin:task/teacher``.
        dtype: torch dtype of the weights; reductions are in float32 whatever it is.
        scoring_temperature: None for the student's, which is the only one that is accepted.
        cache: folder of a cache of its scores; see :class:`~opd_lightning.teacher.cached.CachedScorer`.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
        offload: ``"cpu"`` has the weights on the device while they score or write, and in the CPU's memory
            otherwise; see :class:`~opd_lightning.teacher.offloaded.Offload`.
        quantization: how transformers quantises the weights on load; the head stays as it is. See
            :func:`~opd_lightning.teacher.quantized.configured`.
        shard: whether each process of a run holds a part of the weights; see
            :class:`~opd_lightning.teacher.sharded.ShardedScorer`. They are whole in the CPU's memory on load.

    Raises:
        ConfigError: a way to offload or quantise that there is not, or more than one of offload, quantization and
            shard, or a cache with shard.
    """

    path: str
    dtype: str
    scoring_temperature: float | None = None
    cache: str | None = None
    trust_remote_code: bool = False
    offload: str | None = None
    quantization: Mapping[str, Any] | QuantizationConfigMixin | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        condition, remedy = "be cpu or null", "use cpu"
        require(self.offload in (None, "cpu"), "teacher.offload", condition, self.offload, remedy)
        whole = self.offload is None or self.quantization is None
        condition = "be null with teacher.quantization, whose weights are not copied number by number"
        require(whole, "teacher.offload", condition, self.offload, "use one of the two")
        remedy = "use true to hold a part of the weights on each process"
        require(isinstance(self.shard, bool), "teacher.shard", "be true or false", self.shard, remedy)
        for name in ("offload", "quantization", "cache") if self.shard else ():
            value = getattr(self, name)
            condition = "be null with teacher.shard=true"
            require(value is None, f"teacher.{name}", condition, value, "use one of the two")
        configured(self.quantization)

    @property
    def gives_hidden(self) -> bool:
        """Hidden states are not cached, and a head in parts is whole inside its own forward alone."""
        return self.cache is None and not self.shard

    def load(self, loading: Loading) -> Scoring:
        """Load the model, frozen and in evaluation mode.

        Raises:
            ConfigError: another scoring temperature than the student's; nothing that can be loaded lies at
                ``path``, or its head is not supported.
        """
        loading.check_temperature(self.scoring_temperature, "teacher.scoring_temperature")
        named = self.path, "teacher.path", self.dtype, self.trust_remote_code
        scorer = loading.frozen(*named, configured(self.quantization))
        teacher = ShardedScorer(scorer) if self.shard else FrozenScorer(scorer)
        if self.offload is not None:
            teacher = OffloadedScorer(scorer=scorer, weights=Offload(scorer, self.offload))
        if self.cache is None:
            return teacher
        return cached(teacher, self.cache, weights_digest(scorer.model), loading)
