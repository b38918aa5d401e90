"""What tells two tokenizers or two models apart without sending them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.errors import ConfigError
from opd_lightning.models import PROBES


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """A tokenizer, told by what its ids mean.

    Args:
        ordinary: hash of the ordinary tokens with their ids.
        added: the added tokens (a turn's end, a thought tag) with their ids.
        probes: hash of how some texts are cut.
    """

    ordinary: str
    added: Mapping[str, int]
    probes: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerIdentity:
        """Return a tokenizer's."""
        vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
        ordinary = sorted((token, i) for token, i in vocabulary.items() if i not in added)
        cut = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
        return cls(
            ordinary=_digest(ordinary),
            added={token: i for token, i in sorted(vocabulary.items()) if i in added},
            probes=_digest(cut),
        )

    def check(self, student: PreTrainedTokenizerBase, field: str) -> None:
        """Refuse to be another tokenizer than the student's, as for a teacher in this process.

        Added tokens that one of the two alone has are no difference; see
        :func:`~opd_lightning.models.shared_vocabulary`.

        Raises:
            ConfigError: ids mean other tokens; ``field`` names this one.
        """
        own, vocabulary = TokenizerIdentity.of(student), student.get_vocab()
        moved = [t for t, i in self.added.items() if vocabulary.get(t, i) != i]
        found = None
        if self.ordinary != own.ordinary:
            found = "one with other ordinary tokens"
        elif moved:
            token = moved[0]
            found = (
                f"one with other ids for {len(moved)} special tokens (for example {token!r}: student id "
                f"{vocabulary[token]}, its id {self.added[token]})"
            )
        elif self.probes != own.probes:
            found = "one that cuts text otherwise"
        if found:
            raise ConfigError(
                f"`{field}` must name a teacher with the student's tokenizer, got {found}; serve a model of the "
                "student's family, since log-probs are compared id by id"
            )


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """What a server says of itself.

    Args:
        version: of the wire's format.
        path: of the model, as the server was told; ``dtype`` of its weights.
        model: a hash of its weights: the answers of two servers with the same are the same.
        vocab: width of its logits.
        context: most tokens of a row.
        most_ids: most ids scored at one position, given and top together.
        most_bytes: of a request or an answer.
        tokenizer: what its ids mean.
    """

    version: str
    path: str
    dtype: str
    model: str
    vocab: int
    context: int
    most_ids: int
    most_bytes: int
    tokenizer: TokenizerIdentity

    def words(self) -> dict[str, Any]:
        """Return it as plain numbers and words."""
        return asdict(self)

    @classmethod
    def read(cls, words: Any) -> ServerInfo:
        """Return what :meth:`words` gave.

        Raises:
            TypeError, KeyError: it was not that.
        """
        return cls(**words | {"tokenizer": TokenizerIdentity(**words["tokenizer"])})


def weights_digest(model: nn.Module) -> str:
    """Return a hash of every parameter's name, type, shape and some of its numbers, spread over all of them.

    It costs milliseconds for a model of any size, and another checkpoint or a further step of training has
    another one.
    """
    hashed = hashlib.sha256()
    for name, parameter in model.named_parameters():
        plain = parameter.detach()
        flat = (plain.dequantize() if is_traceable_wrapper_subclass(plain) else plain).flatten()
        some = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        hashed.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        hashed.update(some.numpy().tobytes())
    return hashed.hexdigest()[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
