"""Weights quantised on load, by what transformers offers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from transformers import TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from opd_lightning.errors import ConfigError

_REFUSALS = (
    *(ImportError, ValueError, TypeError, KeyError, RuntimeError, AttributeError, AssertionError),
    NotImplementedError,
)
"""What transformers raises for settings, a package or a device that are not there."""


def configured(
    settings: Mapping[str, Any] | QuantizationConfigMixin | None,
) -> QuantizationConfigMixin | None:
    """Return transformers' configuration of a way to quantise, None for None.

    A dictionary has the method's name, ``quant_method``, and its settings. Of torchao, ``quant_type`` names one of
    its configurations, whose own settings stand beside it: ``{quant_method: torchao, quant_type:
    Int4WeightOnlyConfig, group_size: 32}``.

    Raises:
        ConfigError: there is no such way, or its package or a device that it needs is not here.
    """
    if settings is None:
        return None
    try:
        config = _made(settings)
        AutoHfQuantizer.from_config(config, pre_quantized=False).validate_environment(
            device_map=None, weights_only=True
        )
    except _REFUSALS as error:
        said, got = (" ".join(str(text).split())[:300] for text in (error, settings))
        raise ConfigError(
            f"`teacher.quantization` must be a way of transformers to quantise that works here, got {got} "
            f"({type(error).__name__}: {said}); correct it, or install what it needs (torchao: pip install "
            "'opd-lightning[quantize]')"
        ) from error
    return config


def _made(settings: Mapping[str, Any] | QuantizationConfigMixin) -> QuantizationConfigMixin:
    if isinstance(settings, QuantizationConfigMixin):
        return settings
    if not isinstance(settings, Mapping):
        raise TypeError("a dictionary with quant_method, or a configuration of transformers by its _target_")
    values = copy.deepcopy(dict(settings))  # transformers takes keys out
    if values.get("quant_method") == "torchao" and isinstance(values.get("quant_type"), str):
        from torchao import quantization  # type: ignore[import-not-found]

        own = inspect.signature(TorchAoConfig).parameters.keys()
        inner = {name: value for name, value in values.items() if name not in {*own, "quant_method"}}
        kind = getattr(quantization, values.pop("quant_type"))
        return TorchAoConfig(kind(**inner), **{name: v for name, v in values.items() if name in own})
    return AutoQuantizationConfig.from_dict(values)  # type: ignore[no-any-return]
