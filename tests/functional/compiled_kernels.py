"""Compile every kernel of the head for compute capability 9.0 and print its name; no GPU is needed.

Run by :mod:`test_triton_rows` in a process of its own.
"""

import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from opd_lightning.functional.head import gather_kernels, row_kernels, triton_gather, triton_rows

FP32 = "lse_out entropy_out lse entropy grad_lse grad_entropy lse_s lse_t value_out student_kl_out"
POINTERS = dict.fromkeys([*FP32.split(), "student_kl", "grad", "grads", "heads", "tails"], "*fp32")
POINTERS |= dict.fromkeys(["raw", "bias", "raw_s", "bias_s", "raw_t", "bias_t", "hidden", "weight"], "*bf16")
INTEGERS = dict.fromkeys(["vocab", "k", "stride", "stride_s", "stride_t", "width", "count"], "i32")

FLAGS = {"HAS_BIAS": True, "HAS_CAP": True, "ENTROPY": True}
SIDES = {f"HAS_{what}_{side}": True for what in ("BIAS", "CAP") for side in "ST"} | {"KIND": "mixture"}
ROWS, PAIRS = {"BLOCK": triton_rows.BLOCK}, {"BLOCK": triton_rows.BLOCK // 2}
GATHER = {"BLOCK_K": triton_gather.BLOCK_K, "BLOCK": triton_gather.BLOCK}
PIECES = {"PIECE": triton_gather.PIECE, "BLOCK": triton_gather.COLUMNS}

KERNELS = {
    row_kernels.statistics: ({}, FLAGS | ROWS, 8),
    row_kernels.gradient: ({}, FLAGS | ROWS, 8),
    row_kernels.divergence: ({}, SIDES | PAIRS, 8),
    row_kernels.divergence_gradient: ({}, SIDES | PAIRS, 8),
    gather_kernels.dot: ({"ids": "*i64", "out": "*fp32"}, GATHER, 4),
    gather_kernels.hidden_gradient: ({"ids": "*i64", "out": "*bf16"}, GATHER, 4),
    gather_kernels.weight_pieces: ({"ids": "*i32", "out": "*bf16", "positions": "*i32"}, PIECES, 4),
    gather_kernels.weight_runs: ({"ids": "*i32", "out": "*bf16"}, PIECES, 4),
}


def compiled(kernel, types, constants, warps):
    """Return the machine code of a kernel, its sizes divisible by 16, as a real vocabulary's are."""
    types = POINTERS | INTEGERS | types | dict.fromkeys(constants, "constexpr")
    names = [p.name for p in kernel.params]
    signature = {name: types.get(name, "fp32") for name in names}
    wide = [
        i for i, name in enumerate(names) if signature[name][0] == "*" or name in ("vocab", "stride", "width")
    ]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in wide},
    )
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["cubin"]


if __name__ == "__main__":
    for kernel in sorted(KERNELS, key=lambda kernel: kernel.__name__):
        assert len(compiled(kernel, *KERNELS[kernel])) > 1000
        print(kernel.__name__)
        sys.stdout.flush()
