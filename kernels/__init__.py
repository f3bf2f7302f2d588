"""Low-bit kernels: ops of PyTorch in the namespace `megatron_lowbit`.

PyTorch's dispatcher chooses: `hybrid`, `exact`, `packing`, `quantizer`, `token_rows`, `linear` and `hadamard` register
the plain torch implementations for every device together with their fakes (shapes and dtypes for torch.compile and CUDA
graphs); a faster kernel registers itself for its device type (`cpu`, `cpu_linear`, `gpu`, `gpu_linear`).
"""

from megatron_lowbit.kernels import cpu as cpu  # registers its kernels
from megatron_lowbit.kernels import cpu_linear as cpu_linear
from megatron_lowbit.kernels import gpu as gpu
from megatron_lowbit.kernels import gpu_linear as gpu_linear
from megatron_lowbit.kernels.exact import exact_decode, exact_encode
from megatron_lowbit.kernels.hadamard import hadamard, hadamard_matrix, hadamard_obstacle
from megatron_lowbit.kernels.hybrid import (
    hybrid_pack,
    hybrid_unpack_reduce,
    hybrid_unpack_reduce_into,
    hybrid_unpack_reduce_requantize,
)
from megatron_lowbit.kernels.linear import FLOAT_BITS, quant_linear, rotated_linear
from megatron_lowbit.kernels.packing import codes_per_word, pack_bits, packed_bytes, unpack_bits
from megatron_lowbit.kernels.panels import blocks_of, codes_of, forget_pages, panels_of, rows_of
from megatron_lowbit.kernels.quantizer import dequantize, quantize, quantize_tokens
from megatron_lowbit.kernels.reassembly import NO_NORM, reassemble
from megatron_lowbit.kernels.token_rows import decode_tokens, encode_tokens, round_tokens
from megatron_lowbit.kernels.wire_format import BF16_BITS, Format, header_bytes, hybrid_row_bytes, squared_sizes

__all__ = [
    "BF16_BITS",
    "FLOAT_BITS",
    "NO_NORM",
    "Format",
    "blocks_of",
    "codes_of",
    "codes_per_word",
    "decode_tokens",
    "dequantize",
    "encode_tokens",
    "exact_decode",
    "exact_encode",
    "forget_pages",
    "hadamard",
    "hadamard_matrix",
    "hadamard_obstacle",
    "header_bytes",
    "hybrid_pack",
    "hybrid_row_bytes",
    "hybrid_unpack_reduce",
    "hybrid_unpack_reduce_into",
    "hybrid_unpack_reduce_requantize",
    "pack_bits",
    "packed_bytes",
    "panels_of",
    "quant_linear",
    "quantize",
    "quantize_tokens",
    "reassemble",
    "rotated_linear",
    "round_tokens",
    "rows_of",
    "squared_sizes",
    "unpack_bits",
]
