"""Triton kernels that walk over rows of raw logits; :mod:`triton_rows` calls them, and imports this lazily.

Notation: z = cap(scale * (raw + bias)) * cooling with cooling = 1 / temperature. All arithmetic is float32,
whatever the logits are stored as. The grid's first axis is the row; a row begins at a 64-bit offset, because
rows times vocabulary may exceed 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
"""Below every logit, and finite, so that LOWEST - LOWEST is 0 and not NaN."""

LOG_ZERO = tl.constexpr(-1e4)
"""As in :mod:`opd_lightning.functional.divergence`."""


@triton.jit
def _read(raw, bias, columns, inside, scale, softcap, cooling, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Return z and dz/draw = scale * cooling * (1 - tanh^2); z is 0 where not ``inside``."""
    x = tl.load(raw + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    x *= scale
    slope = tl.zeros_like(x) + scale * cooling
    if HAS_CAP:
        # tanh and 1 - tanh^2 from exp(-2|x|): nothing overflows and the slope does not cancel to 0.
        decay = tl.exp(-2.0 * tl.abs(x / softcap))
        tanh = (1.0 - decay) / (1.0 + decay)
        slope *= 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
        x = softcap * tl.where(x < 0.0, -tanh, tanh)
    return x * cooling, slope


@triton.jit
def statistics(
    raw, bias, lse_out, entropy_out, vocab, stride, scale, softcap, cooling,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write lse [n] and H [n], one program a row, each logit read once.

    With the running maximum m, each lane keeps s = sum e^(z - m) and t = sum e^(z - m) (z - m). When m grows
    by d, both shrink by e^-d and t moves by -d s. At the end lse = m + log s and H = log s - t / s: the
    moment about the maximum does not cancel against lse.
    """
    row = tl.program_id(0).to(tl.int64)
    raw += row * stride
    peak = LOWEST
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        z, _ = _read(raw, bias, columns, inside, scale, softcap, cooling, HAS_BIAS, HAS_CAP)
        z = tl.where(inside, z, LOWEST)
        higher = tl.maximum(peak, tl.max(z, 0))
        shrink = tl.exp(peak - higher)
        e = tl.exp(z - higher)
        if ENTROPY:
            moment = (moment + total * (peak - higher)) * shrink
            moment += tl.where(e > 0.0, e * (z - higher), 0.0)
        total = total * shrink + e
        peak = higher
    mass = tl.sum(total, 0)
    tl.store(lse_out + row, peak + tl.log(mass))
    if ENTROPY:
        tl.store(entropy_out + row, tl.log(mass) - tl.sum(moment, 0) / mass)


@triton.jit
def _through_lse(z, lse, entropy, grad_lse, grad_entropy, row, ENTROPY: tl.constexpr):
    """Return the gradient in z: p (grad_lse - grad_H (log p + H))."""
    logp = z - tl.load(lse + row)
    p = tl.exp(logp)
    pull = tl.zeros_like(z) + tl.load(grad_lse + row).to(tl.float32)
    if ENTROPY:
        information = tl.where(p > 0.0, logp + tl.load(entropy + row), 0.0)
        pull -= tl.load(grad_entropy + row).to(tl.float32) * information
    return p * pull


@triton.jit
def gradient(
    raw, bias, lse, entropy, grad_lse, grad_entropy, vocab, stride, scale, softcap, cooling,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite every logit with its gradient; a program a row and block."""
    row = tl.program_id(0).to(tl.int64)
    raw += row * stride
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    z, slope = _read(raw, bias, columns, inside, scale, softcap, cooling, HAS_BIAS, HAS_CAP)
    gradient = _through_lse(z, lse, entropy, grad_lse, grad_entropy, row, ENTROPY)
    tl.store(raw + columns, (gradient * slope).to(raw.dtype.element_ty), mask=inside)


@triton.jit
def _log_zero(logp):
    # A comparison and no maximum: a NaN must stay one.
    return tl.where(logp < LOG_ZERO, LOG_ZERO, logp)


@triton.jit
def _log_mixture(logs, logt, log_student, log_teacher):
    a = logs + log_student
    b = logt + log_teacher
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def divergence(
    raw_s, bias_s, lse_s, raw_t, bias_t, lse_t, value_out, student_kl_out, vocab, stride_s, stride_t,
    scale_s, softcap_s, cooling_s, scale_t, softcap_t, cooling_t, beta, log_student, log_teacher, factor,
    HAS_BIAS_S: tl.constexpr, HAS_CAP_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_CAP_T: tl.constexpr,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the divergence [n] and, of a mixture, KL(S||M) [n]; one program a row.

    ``KIND`` is "forward", "reverse" or "mixture"; of the last, log_teacher = log beta, log_student =
    log(1 - beta), and the value beta KL(T||M) + (1 - beta) KL(S||M) is multiplied by ``factor``.
    """
    row = tl.program_id(0).to(tl.int64)
    raw_s += row * stride_s
    raw_t += row * stride_t
    normaliser_s = tl.load(lse_s + row)
    normaliser_t = tl.load(lse_t + row)
    of_student = tl.zeros([BLOCK], tl.float32)
    of_teacher = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        zs, _ = _read(raw_s, bias_s, columns, inside, scale_s, softcap_s, cooling_s, HAS_BIAS_S, HAS_CAP_S)
        zt, _ = _read(raw_t, bias_t, columns, inside, scale_t, softcap_t, cooling_t, HAS_BIAS_T, HAS_CAP_T)
        logs = _log_zero(tl.where(inside, zs - normaliser_s, LOG_ZERO))
        logt = _log_zero(tl.where(inside, zt - normaliser_t, LOG_ZERO))
        if KIND == "reverse":
            of_student += tl.exp(logs) * (logs - logt)
        elif KIND == "forward":
            of_teacher += tl.exp(logt) * (logt - logs)
        else:
            mixture = _log_mixture(logs, logt, log_student, log_teacher)
            of_student += tl.exp(logs) * (logs - mixture)
            of_teacher += tl.exp(logt) * (logt - mixture)
    student_kl = tl.sum(of_student, 0)
    value = student_kl + tl.sum(of_teacher, 0)
    if KIND == "mixture":
        value = factor * (beta * tl.sum(of_teacher, 0) + (1.0 - beta) * student_kl)
    tl.store(value_out + row, value)
    tl.store(student_kl_out + row, student_kl)


@triton.jit
def divergence_gradient(
    raw_s, bias_s, lse_s, raw_t, bias_t, lse_t, student_kl, vocab, stride_s, stride_t,
    scale_s, softcap_s, cooling_s, scale_t, softcap_t, cooling_t, beta, log_student, log_teacher, factor,
    HAS_BIAS_S: tl.constexpr, HAS_CAP_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_CAP_T: tl.constexpr,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite the student's logits with the divergence's gradient; a program a row and block.

    Of KL(T||S): S - T. Of KL(S||T): S (log S - log T - KL). Of a mixture the terms through M cancel, and
    what is left is (1 - beta) S (log S - log M - KL(S||M)).
    """
    row = tl.program_id(0).to(tl.int64)
    raw_s += row * stride_s
    raw_t += row * stride_t
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    zs, slope = _read(raw_s, bias_s, columns, inside, scale_s, softcap_s, cooling_s, HAS_BIAS_S, HAS_CAP_S)
    zt, _ = _read(raw_t, bias_t, columns, inside, scale_t, softcap_t, cooling_t, HAS_BIAS_T, HAS_CAP_T)
    logs = _log_zero(zs - tl.load(lse_s + row))
    logt = _log_zero(zt - tl.load(lse_t + row))
    s = tl.exp(logs)
    if KIND == "forward":
        gradient = s - tl.exp(logt)
    elif KIND == "reverse":
        gradient = s * (logs - logt - tl.load(student_kl + row))
    else:
        mixture = _log_mixture(logs, logt, log_student, log_teacher)
        gradient = factor * (1.0 - beta) * s * (logs - mixture - tl.load(student_kl + row))
    tl.store(raw_s + columns, (gradient * slope).to(raw_s.dtype.element_ty), mask=inside)
