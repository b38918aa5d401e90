"""Which checks there are, and all of them on one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from opd_lightning.checks import facts, lengths, machine, pairing, parts, servers
from opd_lightning.checks.finding import Check, Finding, answerable, look, needed
from opd_lightning.errors import ConfigError

_FACTS: dict[str, Callable[..., Any]] = {
    "student": facts.student_facts,
    "teacher_model": facts.teacher_facts,
    "limits": facts.teacher_limits,
}
"""What several checks read, made once: by the name under which they read it."""

_PARTS: dict[str, Check] = {
    "numbers": parts.numbers,
    "scoring temperatures": parts.temperatures,
    "micro-batches": parts.budget,
    "whose tokens teach": parts.taught,
    "importance weights": parts.weighted,
    "support and estimator": parts.hidden,
    "support and teacher": parts.given_ids,
    "support.k": parts.own_support_size,
    "teacher.shard": parts.sharded,
}
"""How the parts fit together: nothing is read for it. Assembling a run checks it again."""

_TOKENIZERS: dict[str, Check] = {
    "tokenizers": pairing.tokens,
    "served tokenizer": pairing.served_tokens,
}
"""What else assembling a run checks again, at once."""

_OTHERS: dict[str, Check] = {
    "devices": machine.devices,
    "clipping": machine.clipping,
    "run folder": machine.run_folder,
    "disk": machine.disk,
    "weights": servers.weights,
    "stop tokens": pairing.stops,
    "the teacher's stop tokens": pairing.teacher_stops,
    "chat templates": pairing.templates,
    "training rows": lengths.training_rows,
    "evaluation rows": lengths.evaluation_rows,
    "the teacher's rows": lengths.teacher_rows,
    "the teacher's server": lengths.served_rows,
    "engine.max_model_len": lengths.engine_rows,
    "the engine's server": servers.engine,
    "teacher.cache": servers.cache,
    "memory": machine.memory,
}
"""What nothing else checks before models are loaded."""


def starting(given: Mapping[str, Any]) -> list[Finding]:
    """Return what is found at the start of a run, whose assembling finds the rest; parts that do not fit first.

    Args:
        given: the arguments of :func:`~opd_lightning.assemble.assemble`, with the ``folder`` of the run, the
            settings ``trainer``, and all of them in ``values``. What needs something that is left out is not checked.
    """
    wrong = [finding for finding in look(_PARTS, given) if finding.level == "error"]
    return wrong or list(_look(_OTHERS, given))  # which may wait for a server


def everything(given: Mapping[str, Any]) -> list[Finding]:
    """Return what can be found without loading a model; see :func:`starting`."""
    return list(_look(_PARTS | _TOKENIZERS | _OTHERS, given))


def _look(checks: Mapping[str, Check], given: Mapping[str, Any]) -> Iterator[Finding]:
    known = dict(given)
    for name, read in _FACTS.items():
        if not answerable(read, given):
            continue
        try:
            found = read(**{key: given[key] for key in needed(read)})
        except ConfigError as error:
            yield Finding.of(error)
            continue
        if found is not None:
            known[name] = found
    yield from look(checks, known)
