"""Leaving secrets out of what is written down: settings, overrides, messages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
"""What stands in a secret's place."""

_SECRET = re.compile(r"(?i)(^|[._-])(token|password|passwd|secret|credential|api_?key|access_?key)s?$")
_WORDS = ("tokens",)
"""Ends of names that hold numbers or names of tokens of text, which are no secrets."""
_USER = re.compile(r"(?<=://)[^/@\s'\"]+@")
_KNOWN = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,})")
_ASSIGNED = re.compile(
    r"(?i)\b([\w.]*?(?:token|password|passwd|secret|credential|api_?key|access_?key))=([^\s,'\"]+)"
)
_SHORTEST = 6
"""Characters of a secret that is looked for in texts; a shorter one would hide words that it is part of."""


def redacted(value: Any) -> Any:
    """Return a setting, or containers of settings, without secrets.

    A secret is what stands under a name that ends in token, password, secret, credential or key (of an API or an
    access), the user's part of an address, a word in the form of a known service's token, and the value of an
    environment variable of such a name, or of one that a setting ``…_env`` names.
    """
    return _redacted(value, secrets(value))


def hide(text: str, also: frozenset[str] = frozenset()) -> str:
    """Return a text without secrets; ``also`` are further ones."""
    for secret in sorted(secrets(None) | also, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _USER.sub(f"{HIDDEN}@", text)
    return _ASSIGNED.sub(rf"\1={HIDDEN}", _KNOWN.sub(HIDDEN, text))


def secrets(settings: Any) -> frozenset[str]:
    """Return the values of the environment's variables that hold secrets, those that settings name among them."""
    names = {name for name in os.environ if _is_secret(name)} | set(_named(settings))
    values = (os.environ.get(name, "").strip() for name in names)
    return frozenset(value for value in values if len(value) >= _SHORTEST)


def _named(value: Any) -> list[str]:
    """Return the environment variables that settings ``…_env`` name."""
    if isinstance(value, Mapping):
        own = [str(inner) for name, inner in value.items() if str(name).endswith("_env") and inner]
        return own + [found for inner in value.values() for found in _named(inner)]
    return [found for inner in value for found in _named(inner)] if isinstance(value, list | tuple) else []


def _redacted(value: Any, known: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _hidden(str(name), inner, known) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(inner, known) for inner in value]
    return hide(value, known) if isinstance(value, str) else value


def _hidden(name: str, value: Any, known: frozenset[str]) -> Any:
    return HIDDEN if isinstance(value, str) and value and _is_secret(name) else _redacted(value, known)


def _is_secret(name: str) -> bool:
    return bool(_SECRET.search(name)) and not name.lower().endswith(_WORDS)
