"""Which kernels the transformer runs on: its attention backend, and compilation.

Both are set on the transformer itself, once, so that rollout and training run the same ones and the
importance ratio before an update stays 1.
"""

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
"""Our names, without what diffusers puts before torch's own kernels, to diffusers' names."""


def resolve_attention(choice: Attention, device: torch.device, dtype: torch.dtype) -> Attention:
    """The backend that ``auto`` stands for on this device; any other choice is itself.

    On a GPU one kernel is named, because torch's own choice may be another one with gradients than
    without, and because the one it prefers on recent GPUs, cuDNN's, has failed in the backward with
    gradient checkpointing (an illegal memory access at FLUX's sequence length): flash attention in
    16 bits, the memory-efficient kernel in float32, plain matrix products in float64, which has no
    other. On the CPU it is torch's own choice, which has one kernel for both.

    Raises:
        UserError: the choice does not run on this device in this dtype.
    """
    if choice == "auto":
        if device.type != "cuda":
            return "native"
        return {torch.float32: "efficient", torch.float64: "math"}.get(dtype, "flash")  # type: ignore[return-value]
    if choice in ("cudnn", "efficient") and device.type != "cuda":
        raise UserError(
            f"execution.attention: {choice} needs a GPU; use auto, native, flash or math"
        )
    narrow = dtype in (torch.bfloat16, torch.float16)
    if choice in ("cudnn", "flash") and device.type == "cuda" and not narrow:
        raise UserError(
            f"execution.attention: {choice} computes in 16 bits, policy.dtype is "
            f"{str(dtype).removeprefix('torch.')}; use auto, native, efficient or math"
        )
    return choice


def set_attention(transformer: Any, choice: Attention) -> None:
    """Gives the transformer the backend ``choice``, already resolved.

    Unless it is the one that was chosen, cuDNN's attention is switched off for whatever else
    attends in this process (the autoencoder, text encoders, reward models).
    """
    if choice != "auto":
        transformer.set_attention_backend(_BACKENDS[choice])
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(choice == "cudnn")


def compile_blocks(transformer: Any) -> None:
    """Compiles each repeated block of the transformer, in place, without graph breaks.

    The blocks share their code, so that each kind is compiled once for batches of one state and
    once for all others, with and without gradients.
    """
    transformer.compile_repeated_blocks(fullgraph=True)


def is_compiled(module: nn.Module) -> bool:
    """Whether the module was compiled in place."""
    return getattr(module, "_compiled_call_impl", None) is not None
