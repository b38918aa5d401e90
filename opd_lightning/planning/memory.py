"""Bytes of a process, by part and at the worst moment.

Held all the time are weights, gradients, the optimizer's state, the frozen models and the experience. What
comes and goes belongs to one of four phases, of which the largest counts:

    generate    the key-value cache, joined weights, weights gathered from other processes, one step's logits
    score       one forward of a scorer without gradient, or its head's logits; the experience a second time
    learn       activations of a micro-batch, the head's tiles, a gradient in the making
    step        what the optimizer needs beside its state

Beside each lies what the allocator keeps to itself, a share of all that a run makes.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_lightning.planning.run import PlannedRun
from opd_lightning.planning.shapes import ModelShape

_TILE = 4 * 2**20
"""Bytes of a tile of logits on a CPU; see :mod:`opd_lightning.functional.head.tiles`."""
_RANKED = (256, 2**20)
"""Rows of logits that a CPU ranks at once: at least the one, else so many elements; see the same module."""
_COMPARED = 10
"""Buffers of two heads' logits that a divergence over the whole vocabulary may want."""
_BLOCK = 256
"""Slots by which the decoder's cache grows; see :mod:`opd_lightning.engine.cache`."""
_JOINED = 2**24
"""Elements up to which the decoder joins matrices of one input; see :mod:`opd_lightning.engine.decoder`."""
_WIDTH = {"float32": 4.0, "mixed": 2.0, "half": 2.0}
KEPT = {"cpu": 0.15, "cuda": 0.1}
"""Share of what a run makes that an allocator holds beside it: freed blocks that nothing fits into.

On CPUs 0 to 0.25 was measured (benchmarks/plan_memory.py, glibc), most where responses differ in length; on
GPUs it is a guess.
"""
_WHOLE_BLOCK = 32 * 2**20
"""Bytes from which glibc asks the system for a block, and gives it back, each time: it leaves no gap."""


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
    phases["score"] |= _unreturned(run, phases)
    trained = held.get("gradients", 0.0) + held.get("optimizer state", 0.0)
    made = _in_gaps(run) * trained + held["experience"]
    for parts in phases.values():
        parts["allocator"] = KEPT[run.device] * (made + sum(parts.values()))
    host = {f"{m.role} weights": m.shape.weights * m.width for m in placed if m.host}
    return Memory(held=held, phases=phases, host=host)


def _in_gaps(run: PlannedRun) -> float:
    """Return the share of the trained weights in matrices small enough for an allocator's own blocks."""
    shape = run.student
    if run.device != "cpu" or shape.trained < shape.weights:
        return 1.0
    kinds = (
        (shape.ends, shape.vocab),
        (shape.body, shape.inner),
    )  # all of a kind, and one matrix's longer side
    small = sum(every for every, side in kinds if side * shape.hidden * run.width < _WHOLE_BLOCK)
    return small / (shape.ends + shape.body)


def _unreturned(run: PlannedRun, phases: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return what learning has left in an allocator's own blocks while logits come in larger ones beside them."""
    logits = phases["score"].get("head scratch", 0.0) / 2 >= _WHOLE_BLOCK
    one = run.micro_batch_rows * run.longest_row * run.student.inner * _WIDTH[run.compute]
    left = run.device == "cpu" and logits and one < _WHOLE_BLOCK
    return {"left of learning": phases["learn"]["activations"]} if left else {}


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
    answered = run.prompt_tokens + run.evaluation_tokens, run.evaluation_rows // run.processes

    def held(length: int, rows: int) -> float:
        slots, before = min(-(-length // _BLOCK) * _BLOCK, length), (length - 1) // _BLOCK * _BLOCK
        return 2.0 * shape.layers * shape.key * width * min(run.engine_rows, rows) * (slots + before)

    return max(held(run.longest_row, run.collection_rows), held(*answered))


def forward_bytes(shape: ModelShape, tokens: float, width: float) -> float:
    """Return what a layer's forward without gradient holds: its states four times, and its MLP or attention."""
    return tokens * width * (4 * shape.hidden + max(3 * shape.inner, 4 * shape.query))


def joined_bytes(run: PlannedRun) -> float:
    """Return the copies of weights that the decoder makes: rounded ones under autocast, else joined ones."""
    shape = run.student
    if run.compute == "mixed":
        return 2.0 * (shape.body + shape.vocab * shape.hidden)
    joined = (shape.hidden * (shape.query + 2 * shape.key), shape.hidden * 2 * shape.inner)
    return run.width * shape.layers * sum(size for size in joined if size <= _JOINED)


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
        tokens = min(run.engine_rows, run.collection_rows) * run.prompt_tokens
        parts["reading prompts"] = forward_bytes(run.student, tokens, _WIDTH[run.compute])
        parts["joined weights"] = joined_bytes(run)
        parts["logits"] = 3 * 4.0 * min(run.engine_rows, run.collection_rows) * run.student.vocab
    if run.sharding.weights and run.sharding.whole and run.processes > 1:
        parts["gathered weights"] = _gathered(run)
    return parts


def _score(run: PlannedRun) -> dict[str, float]:
    tokens = run.scoring_rows * run.longest_row
    models: list[tuple[ModelShape, float]] = [(m.shape, m.width) for m in run.frozen]
    if run.student_scored or run.probe_rows:
        models.append((run.student, _WIDTH[run.compute]))
    one = max((forward_bytes(shape, tokens, width) for shape, width in models), default=0.0)
    states = max((tokens * width * shape.hidden for shape, width in models), default=0.0)
    head = _ranking(run) if run.support else _tiles(run)
    parts = {"one forward": one} if one > states + head else {"hidden states": states, "head scratch": head}
    parts["experience again"] = experience_bytes(run)
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
    layer = tokens * width * (3 * shape.inner + 2 * shape.hidden)
    # The gradient of a tied head waits for that of the embedding; another's is gone when the last layer begins.
    own = layer + head if shape.tied else max(layer, head)
    if run.micro_batch_rows == run.step_rows and run.processes == 1:
        # The gradients of the step before go when the forward has ended, and make room for the backward's own.
        own = max(0.0, own - shape.trained * run.width)
    parts = {
        "activations": kept_bytes(shape, tokens, run.compute, run.checkpointing),
        "backward's own": own,
        "head scratch": _gather(run),
    }
    if (
        run.full
    ):  # it makes the gradients of head and states in the forward pass, beside those of the step before
        states = run.micro_batch_rows * run.longest * shape.hidden * 4.0
        parts |= {"backward's own": max(own, head + states), "head scratch": _whole_rows(run, _COMPARED)[0]}
    elif run.exact_learning:
        parts["head scratch"] = _tiles(run)
    if run.sharding.weights and run.processes > 1:
        parts["gathered weights"] = _fetched(shape, run.width, run.processes)
    return parts


def _step(run: PlannedRun) -> dict[str, float]:
    """Return the optimizer's own: on a GPU a copy of all that it steps at once, else two of its largest weight."""
    if run.optimizer_fused:
        return {"optimizer's own": 0.0}
    trained = _divided(run.student.trained * run.width, run, run.sharding.optimizer)
    largest = _divided(min(run.student.ends, run.student.trained) * run.width, run, run.sharding.optimizer)
    return {"optimizer's own": trained if run.device == "cuda" else 2 * largest}


def _tiles(run: PlannedRun) -> float:
    return run.scratch if run.device == "cuda" else min(run.scratch, 3.0 * _TILE)


def _whole_rows(run: PlannedRun, buffers: int) -> tuple[float, int]:
    """Return the bytes of whole rows of logits in so many buffers, and how many rows that is."""
    most, vocab = max(1, int(run.scratch / (4.0 * buffers * run.student.vocab))), run.student.vocab
    if run.device == "cpu":
        most = min(most, max(_RANKED[0], _RANKED[1] // vocab))
    rows = min(most, max(run.scoring_rows, run.micro_batch_rows) * run.longest)
    return 4.0 * buffers * vocab * rows, rows


def _ranking(run: PlannedRun) -> float:
    """Return what the K likeliest ids of each position need: logits, a spare of them, and K blocks of 64 ids."""
    size, rows = _whole_rows(run, 2)
    return size + (rows * run.support * 64 * 20.0 if run.support * 256 <= run.student.vocab else 0.0)


def _gather(run: PlannedRun) -> float:
    """Return what the K asked rows of the head need: logits and their gradient, ids, and 16 MB of gathered rows."""
    positions = run.micro_batch_rows * run.longest * run.support
    return positions * (8 + 4 + 4 + 8 + 8.0) + (2**24 if run.device == "cuda" else 0)
