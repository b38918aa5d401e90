"""What the scripts on whole training steps share: model folders, prompts, and a meter of time and memory."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

PAD, EOS = 0, 1
RATE, CLIP = 1e-4, 1.0
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
WIDTHS = {"student": 64, "teacher": 128}
PROMPTS = 256
K = 16  # ids at a position, where a loss is on some of them


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run: ``folder`` holds both models and the prompts; ``prompt`` and ``response`` are in tokens."""

    folder: Path
    steps: int = 4
    batch: int = 8
    prompt: int = 32
    response: int = 128

    @property
    def student(self) -> str:
        """The folder of the trained model."""
        return str(self.folder / "student")

    @property
    def teacher(self) -> str:
        """The folder of the frozen model."""
        return str(self.folder / "teacher")

    @property
    def prompts(self) -> Path:
        """The file of the prompts."""
        return self.folder / "prompts.jsonl"

    def texts(self) -> list[str]:
        """Return the prompts' texts."""
        return [json.loads(row)["prompt"] for row in self.prompts.read_text().splitlines()]

    def make(self, vocab: int) -> None:
        """Write the models, their tokenizer, and prompts of exactly ``prompt`` tokens into the folder."""
        words = tokenizer(vocab)
        for seed, (name, width) in enumerate(WIDTHS.items()):
            endless_model(vocab, width, seed).save_pretrained(self.folder / name)
            words.save_pretrained(self.folder / name)
        draw = torch.Generator().manual_seed(0)
        letters = torch.randint(ord("a"), ord("z") + 1, (PROMPTS, self.prompt), generator=draw).tolist()
        rows = [json.dumps({"prompt": "".join(map(chr, row))}) for row in letters]
        self.prompts.write_text("\n".join(rows) + "\n")


def tokenizer(vocab: int) -> Qwen2Tokenizer:
    """Return a tokenizer of bytes, with fillers up to ``vocab`` ids; its chat template is a plain concatenation.

    transformers loads a Qwen2 folder's tokenizer with this class whatever the folder says, so that a
    tokenizer of whole words would not come back as it was saved.
    """
    names = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"w{i}" for i in range(len(names), vocab)]
    return Qwen2Tokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token=None,
        padding_side="left",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


@torch.no_grad()
def endless_model(vocab: int, width: int, seed: int) -> PreTrainedModel:
    """Return a random two-layer Qwen2 that never ends a text, so that every response has the full length.

    The first hidden unit holds the same positive number at every position: the embedding puts it there and
    no layer adds to it. The head reads it for the end of text alone, with a weight that makes its logit so
    negative that its probability is 0 in float32. All trainers then need no setting for a fixed length.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        initializer_range=0.2,  # far from uniform: a divergence of several nats
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model: Any = Qwen2ForCausalLM(config)
    model.model.embed_tokens.weight[:, 0] = 10.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[EOS] = 0.0
    model.lm_head.weight[EOS, 0] = -1000.0
    return model


def resident(key: str) -> float:
    """Return a line of /proc/self/status in MB: VmRSS now, VmHWM the most since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024 / 1e6


def forget_peak() -> None:
    """Begin VmHWM anew at what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


@dataclass
class Meter:
    """Wall and CPU seconds of every step, the CPU seconds of its phases, and the memory that training adds."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    laps: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    base_mb: float = 0.0
    state_mb: float = 0.0
    _wall: float = 0.0
    _cpu: float = 0.0
    _before: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def start(self, job: Job, models: Sequence[Any]) -> None:
        """Note the memory with the models loaded and one forward of each done (logits of one position).

        Every weight is read: those of a file that is mapped are resident from then on alone.
        """
        for weight in (weight for model in models for weight in model.parameters()):
            weight.sum()
        ids = torch.ones(job.batch, job.prompt + job.response, dtype=torch.long)
        for model in models:
            model(input_ids=ids, logits_to_keep=1)
        forget_peak()
        self.base_mb = resident("VmRSS")
        # A gradient and Adam's two moments.
        self.state_mb = 3 * sum(p.numel() * p.element_size() for p in models[0].parameters()) / 1e6
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> None:
        """End a step."""
        wall, cpu, now = time.perf_counter(), time.process_time(), dict(self.seconds)
        phases = {name: spent - self._before.get(name, 0.0) for name, spent in now.items()}
        self.laps.append({"wall": wall - self._wall, "cpu": cpu - self._cpu, "phases": phases})
        self._wall, self._cpu, self._before = wall, cpu, now

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Add the block's CPU seconds to ``phase``: other work on the machine changes them little."""
        start = time.process_time()
        yield
        self.seconds[phase] += time.process_time() - start

    def timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call`` with its CPU seconds added to ``phase``."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return call(*args, **kwargs)

        return wrapped

    def result(self) -> dict[str, Any]:
        """Return what the process has to say."""
        extra = resident("VmHWM") - self.base_mb
        return {"laps": self.laps, "extra_mb": extra, "state_mb": self.state_mb, "losses": self.losses}
