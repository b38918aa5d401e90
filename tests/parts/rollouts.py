"""Every rollout's yaml, built, and writers with two tiny models and responses of ragged lengths."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from tiny import VOCAB, tiny_model

from opd_lightning.commands import build
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.paths import CONF_DIR
from opd_lightning.protocols import Writers
from opd_lightning.types import Finish, Generation, Problem, PromptBatch, Rollout, Sampling

NAMES = sorted(f.stem for f in (CONF_DIR / "rollout").glob("*.yaml"))
STOPS = (3, 11, 19, 27, 35, 43)
"""About every eighth token, so that some responses end and some do not."""


def rollout_of(name: str, **changes: Any):
    """Build ``conf/rollout/<name>.yaml`` with values changed, as a command does."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("train", [f"rollout={name}", *(f"rollout.{k}={v}" for k, v in changes.items())])
    return build(config.rollout)


def short(name: str, **changes: Any):
    """The same with responses of at most 12 tokens."""
    return rollout_of(name, **{"max_new_tokens": 12} | changes)


def prompts_of(rows: int = 6, *, seed: int = 0) -> PromptBatch:
    """Return ragged prompts of 1 to 7 tokens."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (rows,), generator=random)
    return PromptBatch(
        ids=torch.randint(0, VOCAB, (rows, 7), generator=random),
        mask=torch.arange(7) >= 7 - lengths[:, None],
        problems=tuple(Problem(index=100 + i, messages=(), response=str(i)) for i in range(rows)),
        seeds=tuple(range(500, 500 + rows)),
    )


class Pair:
    """A student, a teacher and gold text, and who wrote what: ``asked`` keeps every call."""

    def __init__(self, student: int = 1, teacher: int = 2) -> None:
        self.models = {"student": tiny_model(student).eval(), "teacher": tiny_model(teacher).eval()}
        self.engine = TransformersEngine(batch_size=4)
        self.asked: list[tuple[str, PromptBatch, int]] = []

    @property
    def writers(self) -> Writers:
        return Writers(
            student=partial(self.draw, "student"),
            teacher=partial(self.draw, "teacher"),
            gold=self.gold,
            mixed=self.mixed,
        )

    def draw(self, who: str, prompts: PromptBatch, sampling: Sampling) -> Generation:
        self.asked.append((who, prompts, sampling.max_new_tokens))
        bound = replace(sampling, stop_ids=STOPS, vocab=VOCAB)
        return self.engine.generate(self.models[who], prompts, bound)

    def mixed(self, prompts: PromptBatch, sampling: Sampling, combine) -> Generation:
        self.asked.append(("mixed", prompts, sampling.max_new_tokens))
        bound = replace(sampling, stop_ids=STOPS, vocab=VOCAB)
        return self.engine.generate_mixed(*self.models.values(), prompts, bound, combine)

    def gold(self, prompts: PromptBatch) -> Generation:
        """Each problem's own text: 3 to 15 tokens, the last a stop token."""
        self.asked.append(("gold", prompts, 0))
        lengths = torch.tensor([3 + problem.index % 7 * 2 for problem in prompts.problems])
        mask = torch.arange(int(lengths.amax())) < lengths[:, None]
        ids = torch.stack(
            [(p.index + torch.arange(mask.shape[1])) % VOCAB // 4 * 4 for p in prompts.problems]
        )
        ids[torch.arange(len(ids)), lengths - 1] = STOPS[0]
        return Generation(
            ids=ids * mask,
            mask=mask,
            behavior_logp=torch.zeros(ids.shape),
            finish=torch.full((len(ids),), int(Finish.EOS)),
        )

    def roll(
        self, part: Any, prompts: PromptBatch | None = None, progress: float = 0.4, top_ids: int = 0
    ) -> Rollout:
        """Have ``part`` write for ``prompts``, six by default."""
        return part(prompts_of() if prompts is None else prompts, self.writers, progress, top_ids)


def text(rollout: Rollout | Generation, row: int) -> list[int]:
    """Return a row's tokens."""
    return rollout.ids[row][rollout.mask[row]].tolist()


def token_logp(model, rollout: Rollout, row: int) -> torch.Tensor:
    """Return the model's log-probs of a row's tokens, by one forward without padding."""
    prompt = rollout.prompt.ids[row][rollout.prompt.mask[row]].tolist()
    ids = torch.tensor([prompt + text(rollout, row)])
    with torch.no_grad():
        logp = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logp.gather(-1, ids[0, len(prompt) :, None])[:, 0]
