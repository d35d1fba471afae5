"""The transformer's kernels: its attention backend, and compilation.

Both are set once on the transformer itself, so that rollout and training use the same kernels and
the importance ratio before an update stays 1.
"""

import ctypes
from typing import Any, Literal

import torch
from torch import nn

from g2rpo.errors import UserError

Attention = Literal["auto", "native", "flash", "efficient", "math", "cudnn"]

_BACKENDS = {
    "native": "native",
    "flash": "_native_flash",
    "efficient": "_native_efficient",
    "math": "_native_math",
    "cudnn": "_native_cudnn",
}
"""Our names to diffusers' names."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""


def resolve_attention(choice: Attention, device: torch.device, dtype: torch.dtype) -> Attention:
    """Resolves ``auto`` for this device; returns any other choice unchanged.

    On the CPU this is torch's own choice. On a GPU it is one fixed kernel, because torch may choose
    different ones with and without gradients, and because its preference on recent GPUs, cuDNN's,
    has failed in the backward with gradient checkpointing (an illegal memory access at FLUX's
    sequence length): flash attention in 16 bits, the memory-efficient kernel in float32, plain
    matrix products in float64.

    Raises:
        UserError: the choice is not available for this device and dtype.
    """
    if choice == "auto":
        if device.type != "cuda":
            return "native"
        return {torch.float32: "efficient", torch.float64: "math"}.get(dtype, "flash")  # type: ignore[return-value]
    if choice in ("cudnn", "efficient") and device.type != "cuda":
        raise UserError(
            f"execution.attention: {choice} requires a GPU; use auto, native, flash or math"
        )
    narrow = dtype in (torch.bfloat16, torch.float16)
    if choice in ("cudnn", "flash") and device.type == "cuda" and not narrow:
        raise UserError(
            f"execution.attention: {choice} requires a 16-bit policy.dtype, not "
            f"{str(dtype).removeprefix('torch.')}; use auto, native, efficient or math"
        )
    return choice


def set_attention(transformer: Any, choice: Attention) -> None:
    """Sets the attention backend ``choice``, already resolved.

    Unless chosen, cuDNN's attention is disabled for the whole process (the autoencoder, text
    encoders and reward models).
    """
    if choice != "auto":
        transformer.set_attention_backend(_BACKENDS[choice])
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(choice == "cudnn")


def compile_blocks(transformer: Any) -> None:
    """Compiles the repeated blocks of the transformer, in place, without graph breaks.

    Blocks share their code, so each kind is compiled once for a batch of one and once for larger
    batches, with and without gradients.
    """
    from g2rpo.policy.cpu_blocks import use_diffusers_blocks  # imports diffusers

    use_diffusers_blocks(transformer)  # of which the compiler fuses more
    if not transformer._repeated_blocks:  # noqa: SLF001 - diffusers names those of some models only
        transformer._repeated_blocks = list(transformer._no_split_modules)  # noqa: SLF001
    transformer.compile_repeated_blocks(fullgraph=True)


def is_compiled(module: nn.Module) -> bool:
    """Whether the module was compiled in place."""
    return getattr(module, "_compiled_call_impl", None) is not None


def keep_freed_memory() -> None:
    """Makes this process keep freed memory for reuse, where its C library is glibc.

    Otherwise glibc returns the activations of a forward to the system, and each page of the next
    one's is faulted in and zeroed again (thousands per forward of the mini world).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, size in ((_M_MMAP_THRESHOLD, 32 * 2**20), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(parameter, size)
