"""Log-ratios of the taken token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def log_ratio(
    student_logp: Float[Tensor, "*shape"], teacher_logp: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return r = log T(y) - log S(y), the reward of on-policy distillation, in at least float32.

    Under y ~ S its mean is -KL(S||T). It is positive where the teacher likes the token more.
    """
    dtype = torch.promote_types(torch.promote_types(student_logp.dtype, teacher_logp.dtype), torch.float32)
    return teacher_logp.to(dtype) - student_logp.to(dtype)
