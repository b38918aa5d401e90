"""Bytes of a process, by part and at the worst moment.

Held all the time are weights, gradients, the optimizer's state, the frozen models and the experience. What
comes and goes belongs to one of three phases, of which the largest counts:

    generate    the key-value cache, weights gathered from other processes, one step's logits
    score       one forward of a scorer without gradient, its tiles of logits, the experience a second time
    learn       activations of a micro-batch, the head's tiles, a gradient in the making
    step        what the optimizer needs beside its state
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_lightning.planning.run import PlannedRun
from opd_lightning.planning.shapes import ModelShape

_TILE = 4 * 2**20
"""Bytes of a tile of logits on a CPU; see :mod:`opd_lightning.functional.head.tiles`."""
_BLOCK = 256
"""Slots by which the decoder's cache grows; see :mod:`opd_lightning.engine.cache`."""
_WIDTH = {"float32": 4.0, "mixed": 2.0, "half": 2.0}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process.

    Args:
        held: by part, there all the time.
        phases: by phase, what it needs beside, by part.
        host: by part, what waits on the CPU of a run on GPUs.
    """

    held: dict[str, float]
    phases: dict[str, dict[str, float]]
    host: dict[str, float]

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part at the worst moment; they add up to :attr:`peak`."""
        return self.held | self.phases[self.worst]

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return sum(self.parts.values())


def memory(run: PlannedRun) -> Memory:
    """Return the memory of one process of a run."""
    placed = [model for model in run.frozen if model.copy]
    here = [model for model in placed if not model.host]
    held = {
        "libraries": run.runtime,
        "student weights": _divided(run.student.weights * run.width, run, run.sharding.weights),
        "gradients": _divided(run.student.trained * run.width, run, run.sharding.gradients)
        + (run.student.trained * run.width if run.sharding.buckets and run.processes > 1 else 0.0),
        "optimizer state": _divided(
            run.student.trained * run.width * run.optimizer_states, run, run.sharding.optimizer
        ),
        **{f"{m.role} weights": _divided(m.shape.weights * m.width, run, m.divided) for m in here},
        "experience": experience_bytes(run),
    }
    if run.engine == "copy":
        held["engine's copy"] = run.student.weights * (run.width if run.compute == "float32" else 2.0)
    held = {name: size for name, size in held.items() if size}
    phases = {"generate": _generate(run), "score": _score(run), "learn": _learn(run), "step": _step(run)}
    host = {f"{m.role} weights": m.shape.weights * m.width for m in placed if m.host}
    return Memory(held=held, phases=phases, host=host)


def activation_bytes(shape: ModelShape, tokens: float, compute: str) -> float:
    """Return what a backward pass needs kept of ``tokens`` in all layers, without logits.

    Elements of a layer: 3 h a norm (its input, the same normalised, its output), queries, keys, values and
    attention's output, 4 f of a gated MLP; attention's matrix is never kept. Read off what autograd keeps of
    Qwen2, Qwen3 and Llama; others differ by some ten percent, and one that attends eagerly (Gemma 2's capped
    scores) keeps that matrix too, which is not in here.
    """
    heads, norms = shape.query + shape.key, shape.norms * shape.hidden
    # A norm computes in float32: of half weights its input is kept so. Autocast rounds what a norm puts out for
    # each of the five matrices behind it.
    norm, cast, end = {"float32": (12.0, 0.0, 12.0), "mixed": (8.0, 10.0, 12.0), "half": (8.0, 0.0, 8.0)}[
        compute
    ]
    own_norm = (8.0 if compute == "float32" else 6.0) if shape.query_norm else 0.0
    plain = _WIDTH[compute] * (2 * heads + 4 * shape.inner)
    layer = norm * norms + cast * shape.hidden + own_norm * heads + plain
    return tokens * (shape.layers * layer + end * shape.hidden)


def kept_bytes(shape: ModelShape, tokens: float, compute: str, checkpointing: bool) -> float:
    """Return the activations of a micro-batch; with checkpointing a state a layer, and one layer whole."""
    casts = 2.0 * shape.body if compute == "mixed" else 0.0  # autocast keeps the weights that it rounded
    if not checkpointing:
        return activation_bytes(shape, tokens, compute) + casts
    states = tokens * shape.layers * shape.hidden * (2.0 if compute == "half" else 4.0)
    return states + (activation_bytes(shape, tokens, compute) + casts) / max(shape.layers, 1)


def experience_bytes(run: PlannedRun) -> float:
    """Return the bytes of a collection's experience on one process, every response at its longest."""
    position = 8 + 1 + 8 + 1 + 5 * 4.0  # ids, mask, origin, horizon; behavior, share, teacher's two, one more
    position += run.support * (8 + 1 + 4.0)
    if run.full:
        widest = max((model.shape.hidden for model in run.frozen), default=run.student.hidden)
        position += widest * (4.0 if run.compute == "float32" else 2.0)
    return run.collection_rows * (run.prompt_tokens * 9.0 + run.longest * position)


def cache_bytes(run: PlannedRun, shape: ModelShape, width: float) -> float:
    """Return the key-value cache of the responses that are generated together, with the copy as it grows."""
    if run.engine_cache is not None:
        return run.engine_cache
    if run.engine == "server":
        return 0.0
    rows = min(run.engine_rows, run.collection_rows)
    slots = min(-(-run.longest_row // _BLOCK) * _BLOCK, run.longest_row)
    before = (run.longest_row - 1) // _BLOCK * _BLOCK
    return 2.0 * shape.layers * shape.key * width * rows * (slots + before)


def _divided(size: float, run: PlannedRun, divided: bool) -> float:
    return size / run.processes if divided else size


def _gathered(run: PlannedRun) -> float:
    """Return what a process holds of the weights of others while all of them are there."""
    return run.student.weights * run.width * (1 - 1 / run.processes)


def _generate(run: PlannedRun) -> dict[str, float]:
    parts: dict[str, float] = {}
    if run.writers & {"student", "mixed"}:
        parts["key-value cache"] = cache_bytes(run, run.student, _WIDTH[run.compute])
    for model in run.frozen:
        if run.writers & {"teacher", "mixed"} and model.role == "teacher":
            more = cache_bytes(run, model.shape, model.width)
            parts["key-value cache"] = parts.get("key-value cache", 0.0) + more
    if run.engine == "here":
        parts["logits"] = 3 * 4.0 * min(run.engine_rows, run.collection_rows) * run.student.vocab
    if run.sharding.weights and run.sharding.whole and run.processes > 1:
        parts["gathered weights"] = _gathered(run)
    return parts


def _score(run: PlannedRun) -> dict[str, float]:
    tokens = run.scoring_rows * run.longest_row
    models: list[tuple[ModelShape, float]] = [(m.shape, m.width) for m in run.frozen]
    if run.student_scored or run.probe_rows:
        models.append((run.student, _WIDTH[run.compute]))
    passes = [tokens * width * (3 * s.inner + 4 * s.hidden + s.query + 2 * s.key) for s, width in models]
    parts = {
        "one forward": max(passes, default=0.0),
        "head scratch": _tiles(run),
        "experience again": experience_bytes(run),
    }
    parts |= {f"{m.role} from the CPU": m.shape.weights * m.width for m in run.frozen if m.host and m.copy}
    if run.sharding.weights and run.sharding.whole and run.processes > 1:
        parts["gathered weights"] = _gathered(run)
    for model in run.frozen:
        if model.divided and run.processes > 1:
            parts[f"{model.role}, gathered"] = _fetched(model.shape, model.width, run.processes)
    return parts


def _fetched(shape: ModelShape, width: float, processes: int) -> float:
    """Return what a forward holds of the weights of others: a layer and the one fetched ahead, or both ends."""
    return min(max(2 * shape.layer, shape.ends), shape.weights * (1 - 1 / processes)) * width


def _learn(run: PlannedRun) -> dict[str, float]:
    shape, width = run.student, _WIDTH[run.compute]
    tokens = run.micro_batch_rows * run.longest_row
    head = shape.vocab * shape.hidden * 4.0 if shape.work.head_trained else 0.0
    parts = {
        "activations": kept_bytes(shape, tokens, run.compute, run.checkpointing),
        "backward's own": tokens * width * (3 * shape.inner + 2 * shape.hidden),
        # The head's gradient is made whole before it is added to another: the embedding's, or the last micro-batch's.
        "head's gradient": head,
        "head scratch": _tiles(run) if run.exact_learning or run.full else _gather(run),
    }
    if run.sharding.weights and run.processes > 1:
        parts["gathered weights"] = _fetched(shape, run.width, run.processes)
    return parts


def _step(run: PlannedRun) -> dict[str, float]:
    """Return the optimizer's own: on a GPU a copy of all that it steps at once, else of its largest weight."""
    trained = _divided(run.student.trained * run.width, run, run.sharding.optimizer)
    largest = _divided(min(run.student.ends, run.student.trained) * run.width, run, run.sharding.optimizer)
    return {"optimizer's own": trained if run.device == "cuda" else 2 * largest}


def _tiles(run: PlannedRun) -> float:
    return run.scratch if run.device == "cuda" else min(run.scratch, 3.0 * _TILE)


def _gather(run: PlannedRun) -> float:
    """Return what the K asked rows of the head need: logits and their gradient, ids, and 16 MB of gathered rows."""
    positions = run.micro_batch_rows * run.longest * run.support
    return positions * (8 + 4 + 4 + 8 + 8.0) + (2**24 if run.device == "cuda" else 0)
