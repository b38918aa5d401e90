"""What a check has found, and running many checks one by one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from opd_lightning.errors import ConfigError

Level = Literal["error", "warning", "ok"]
Check = Callable[..., "Iterable[Finding] | None"]
"""Takes what it reads by name. It yields findings, or raises ConfigError for an error."""

_FORM = re.compile(r"`(?P<field>[^`]+)` (?P<sentence>.+); (?P<remedy>[^;]+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What holds of a setting (``ok``), should not (``warning``), or cannot be (``error``), and what to do about it."""

    level: Level
    field: str
    sentence: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """The whole sentence, in the project's one form."""
        name = f"`{self.field}` " if self.field else ""
        return f"{name}{self.sentence}" + (f"; {self.remedy}" if self.remedy else "")

    @classmethod
    def of(cls, error: ConfigError) -> Finding:
        """Return the finding that says what an error says."""
        text = " ".join(str(error).split())
        form = _FORM.fullmatch(text)
        words = form.groupdict() if form else {"field": "", "sentence": text}
        return cls(level="error", **words)


def ok(field: str, sentence: str) -> Finding:
    """Return what is as it should be."""
    return Finding(level="ok", field=field, sentence=sentence)


def warning(field: str, condition: str, value: Any, remedy: str) -> Finding:
    """Return what a run can go on with and its user should know: `field` should <condition>, got <value>; <remedy>."""
    return Finding(level="warning", field=field, sentence=f"should {condition}, got {value}", remedy=remedy)


def refuse(field: str, condition: str, got: str, remedy: str) -> NoReturn:
    """Raise the error of something that was found, in the project's one form; ``got`` are words and no value.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(f"`{field}` must {condition}, got {got}; {remedy}")


def needed(check: Callable[..., Any]) -> list[str]:
    """Return the names of what a check reads."""
    return list(inspect.signature(check).parameters)


def answerable(check: Callable[..., Any], given: Mapping[str, Any]) -> bool:
    """Return whether everything that a check reads is given."""
    return all(name in given for name in needed(check))


def look(checks: Mapping[str, Check], given: Mapping[str, Any]) -> Iterator[Finding]:
    """Run each check that everything is given for, and yield what it finds.

    A check that is broken itself is a warning: it must not keep a good run from starting.

    Args:
        checks: by what each is about.
        given: what they read, by the names of their parameters.
    """
    for about, check in checks.items():
        if not answerable(check, given):
            continue
        try:
            found = list(check(**{name: given[name] for name in needed(check)}) or ())
        except ConfigError as error:
            found = [Finding.of(error)]
        except Exception as error:
            remedy = "the run goes on without it"
            found = [warning(about, "be checked", f"{type(error).__name__}: {error}", remedy)]
        yield from found or [ok(about, "as it must be")]
