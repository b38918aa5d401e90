"""The language-model head, never all at once: log-probs at asked ids without ``[n vocab]`` tensors.

Hidden states ``[n hidden]`` and a :class:`Head` go in, ``[n k]`` comes out, in three modes:

- :func:`support_logits` touches only the k rows of the head that are asked for: enough for a divergence
  renormalised on a support, which needs no normaliser over the vocabulary;
- :func:`exact` (and :func:`top`, without gradient) give log-probs under the full softmax;
- :func:`full` gives a divergence over the whole vocabulary.

The last three walk over tiles of the ``[n vocab]`` logits that fit into ``scratch`` bytes, whatever n is,
and compute a tile again where the backward pass needs it. Matrix products run in the head's own precision
(autocast's under autocast), all that follows (normaliser, entropy, divergence) in float32, or float64
for a float64 head.
"""

from opd_lightning.functional.head.exact import Exact, exact
from opd_lightning.functional.head.full import full
from opd_lightning.functional.head.gathered import support_logits
from opd_lightning.functional.head.spec import Finish, Head
from opd_lightning.functional.head.tiles import SCRATCH
from opd_lightning.functional.head.top import Top, top

__all__ = ["SCRATCH", "Exact", "Finish", "Head", "Top", "exact", "full", "support_logits", "top"]
