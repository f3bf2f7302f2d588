"""Low-bit kernels: one op per function below, registered with torch.library under `megatron_lowbit::`.

torch.library is the dispatch: `reference` registers the plain torch implementation for every device together with its
fake (shapes and dtypes for torch.compile and CUDA graphs); a faster kernel registers itself for its device type.
"""

from megatron_lowbit.kernels.packing import pack_bits, packed_bytes, unpack_bits
from megatron_lowbit.kernels.reference import (
    dequantize,
    hybrid_pack,
    hybrid_row_bytes,
    hybrid_unpack_reduce,
    quant_linear,
    reassemble,
)

__all__ = [
    "dequantize",
    "hybrid_pack",
    "hybrid_row_bytes",
    "hybrid_unpack_reduce",
    "pack_bits",
    "packed_bytes",
    "quant_linear",
    "reassemble",
    "unpack_bits",
]
