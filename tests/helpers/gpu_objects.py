"""Machine code of every Triton kernel for GPUs that are not here, and what it costs them: `python gpu_objects.py`.

The package's own launch code runs on tensors of device "meta", at the widths of LLaMA-2 7B; each launch is compiled for
each target, with the specializations that a launch on a GPU would have, and the objects are read: registers, spills,
stack, shared memory and the instructions of the tensor cores. Prints tables in Markdown.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from megatron_lowbit.kernels import (
    NO_NORM,
    Format,
    triton_hadamard,
    triton_hybrid,
    triton_linear,
    triton_quantize,
    triton_reassembly,
)
from megatron_lowbit.kernels.packing import packed_bytes
from megatron_lowbit.kernels.quantizer import TokenQuantizer

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
TYPES = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What multiplies matrices: by warps, groups of warps (Hopper) or the tensor memory's unit (Blackwell).
MATRIX = r"\b(?:IMMA|HMMA|IGMMA|HGMMA|UTC[A-Z]*MMA)\.?[\w.]*|v_mfma_\w+|v_wmma_\w+"


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]  # tensors, numbers, tuples of numbers, constants
    options: dict[str, Any]


class Object(NamedTuple):
    """What a kernel's machine code needs of a multiprocessor, per thread or per program."""

    registers: int
    spills: int  # registers that are kept in memory
    stack: int  # bytes of a thread's local memory
    shared: int  # bytes
    matrix: tuple[str, ...]  # instructions of the tensor cores


@contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Keep launches instead of making them: those that a device of the target would get."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **more: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {name: value for name, value in more.items() if name in self.arg_names}
        options = {name: value for name, value in more.items() if name not in self.arg_names}
        launches.append(Launch(self, arguments, options))

    before = JITFunction.run, triton_linear.HIP
    JITFunction.run, triton_linear.HIP = run, TARGETS[target].backend == "hip"
    try:
        yield launches
    finally:
        JITFunction.run, triton_linear.HIP = before


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """Compile as a launch would: a number is a constant if it is 1, and its multiples of 16 are known for that."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, path: tuple[int, ...], specialize: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(one, (*path, i), specialize) for i, one in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if value == 1 and specialize:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0 and specialize:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"

    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = kind(value, (i,), not parameter.do_not_specialize)
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def read(made: Any) -> Object:
    if "amdgcn" in made.asm:
        text = made.asm["amdgcn"]
        count = {name: int(value) for name, value in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)$", text, re.M)}
        spills = count["vgpr_spill_count"]  # scalar registers go to lanes of vector registers, not to memory
        stack = count["private_segment_fixed_size"]
        registers = count["vgpr_count"] + count.get("agpr_count", 0)
        found = re.findall(MATRIX, text)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
            text = _tool("nvdisasm", "-c", file.name)
        count = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        registers, stack = count["REG"], count["STACK"] + count["LOCAL"]
        spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
        found = re.findall(MATRIX, text)
    return Object(registers, spills, stack, made.metadata.shared, tuple(sorted({name.rstrip(".") for name in found})))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def linear(tokens: int, bits: int, act_bits: int, dtype=torch.bfloat16, groups=1, act_groups=1, **more: Any) -> None:
    """Launch quant_linear at the widths of LLaMA-2 7B's attention."""
    x = torch.empty((tokens, 4096), dtype=dtype, device="meta")
    packed = torch.empty((4096, packed_bytes(4096, bits)), dtype=torch.uint8, device="meta")
    scale = torch.empty((4096, groups), device="meta")
    triton_linear.quant_linear(x, packed, scale, scale, bits, TokenQuantizer(act_bits, act_groups), dtype, **more)


def quantize() -> None:
    triton_quantize.quantize_tokens(torch.empty((64, 4096), dtype=torch.bfloat16, device="meta"), TokenQuantizer(8))


def hadamard(width: int, groups: int, dtype=torch.bfloat16) -> None:
    triton_hadamard.hadamard(torch.empty((64, width), dtype=dtype, device="meta"), groups)


def reassemble(eps: float, dtype=torch.bfloat16) -> None:
    """Launch the gather behind a norm of LLaMA-2 7B: 4096 channels, 128 of them merged into others."""
    x = torch.empty((64, 4096), dtype=dtype, device="meta")
    index = torch.empty(4224, dtype=torch.int64, device="meta")
    triton_reassembly.reassemble(x, index, index, torch.empty(4224, device="meta"), 4096, eps)


def hybrid(per_token: bool, features: int = 4096) -> None:
    """Launch the three kernels of triton_hybrid.py."""
    tiers = [16, 64, 3, 1024, 6, 512, 5, features - 1600]
    scale, order = torch.empty((2, features), device="meta"), torch.empty(features, dtype=torch.int64, device="meta")
    one, all = (Format(s, s, order, tiers, per_token) for s in (scale[0], scale))
    x = torch.empty((4096, features), dtype=torch.bfloat16, device="meta")
    messages = torch.empty((2, 4096, one.row_bytes), dtype=torch.uint8, device="meta")
    triton_hybrid.pack(x, one)
    triton_hybrid.unpack_reduce(messages, all, x)
    triton_hybrid.requantize(messages, all, one, programs=1)


def launches(target: str) -> dict[str, Launch]:
    """Return {name: launch} of what differs on a target: widths of codes, kinds of tokens, tiles, groups."""
    calls: dict[str, Callable[[], object]] = {
        "W4A8 16 tokens": lambda: linear(15, 4, 8),
        "W4A8 64 tokens": lambda: linear(63, 4, 8),
        "W4A8 1024 tokens": lambda: linear(1024, 4, 8),
        "W4A8 8 groups 16 tokens": lambda: linear(15, 4, 8, act_groups=8),
        "W4A8 8 groups 1024 tokens": lambda: linear(1024, 4, 8, act_groups=8),
        "W8A8 16 tokens": lambda: linear(15, 8, 8),
        "W8A8 1024 tokens": lambda: linear(1024, 8, 8),
        "W6A6 16 tokens": lambda: linear(15, 6, 6),
        "W6A6 1024 tokens": lambda: linear(1024, 6, 6),
        "W3A8 16 tokens": lambda: linear(15, 3, 8),
        "W2A8 1024 tokens": lambda: linear(1024, 2, 8),
        "W4A16 16 tokens": lambda: linear(16, 4, 16),
        "W4A16 64 tokens": lambda: linear(63, 4, 16),
        "W4A16 1024 tokens": lambda: linear(1024, 4, 16),
        "W4A16 32 groups 16 tokens": lambda: linear(16, 4, 16, groups=32),
        "W4A16 32 groups 1024 tokens": lambda: linear(1024, 4, 16, groups=32),
        "W8A16 float16 16 tokens": lambda: linear(16, 8, 16, torch.float16),
        "W4A16 float32 16 tokens": lambda: linear(16, 4, 16, torch.float32),
        "W4A16 float32 1024 tokens": lambda: linear(1024, 4, 16, torch.float32),
        "quantize_tokens": quantize,
        "norm and reassembly": lambda: reassemble(1e-5),
        "reassembly without a norm": lambda: reassemble(NO_NORM),
        "norm and reassembly, float32": lambda: reassemble(1e-5, torch.float32),
        "11008 channels in 8 groups": lambda: hadamard(11008, 8),
        "11008 channels in 1 group": lambda: hadamard(11008, 1),
        "16384 channels in 1 group": lambda: hadamard(16384, 1),
        "128 channels in 1 group": lambda: hadamard(128, 1),
        "16368 channels in 1 group, float32": lambda: hadamard(16368, 1, torch.float32),
        "8192 channels in 1 group, float64": lambda: hadamard(8192, 1, torch.float64),
        "hybrid static": lambda: hybrid(False),
        "hybrid per-token": lambda: hybrid(True),
        "hybrid static 4100 wide": lambda: hybrid(False, 4100),
    }
    found = {}
    for name, call in calls.items():
        with recorded(target) as made:
            call()
        for launch in made:
            found[f"{name}: {launch.kernel.__name__.removesuffix('_kernel')}"] = launch
    return found


def main() -> None:
    every = {target: launches(target) for target in TARGETS}
    found = {
        name: {target: read(compiled(every[target][name], TARGETS[target])) for target in TARGETS}
        for name in every["sm_80"]
    }
    print(f"Triton {triton.__version__}\n\n{tables(found)}")


def tables(found: dict[str, dict[str, Object]]) -> str:
    """Return two tables in Markdown: registers, spills, stack and shared memory; instructions of the tensor cores."""
    head = f"| {' | '.join(['', *TARGETS])} |\n|---|{'---|' * len(TARGETS)}\n"
    costs, instructions = "", ""
    for name, of in found.items():
        costs += f"| {name} | {' | '.join(' / '.join(map(str, one[:4])) for one in of.values())} |\n"
        if any(one.matrix for one in of.values()):
            instructions += f"| {name} | {' | '.join(', '.join(one.matrix) or '-' for one in of.values())} |\n"
    return f"Registers / spills / stack / shared:\n\n{head}{costs}\nTensor cores:\n\n{head}{instructions}"


if __name__ == "__main__":
    main()
