"""Runs one double and one single block of FLUX.1-dev's shape, forward and backward, on every GPU.

Random weights, bfloat16, gradient checkpointing, 720x720 pixels and 512 text tokens: the paper's
training except for its depth. It runs in its own process, since an illegal memory access leaves an
unusable CUDA context.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from reproduce.checks.whole_path import run_module
from slurm.checks.finding import Finding

NAME = "FLUX blocks"
LIMIT = 300
"""Time limit for all GPUs, in seconds."""


def _inputs(model: Any, side: int, tokens: int) -> dict[str, Any]:
    """Inputs of one image of ``side`` rows and columns of packed tokens, and its text tokens."""
    options: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    ids = torch.zeros(side, side, 3, device=model.device)
    ids[..., 1] = torch.arange(side, device=model.device)[:, None]
    ids[..., 2] = torch.arange(side, device=model.device)[None, :]
    return {
        "hidden_states": torch.randn(1, side * side, 64, **options),
        "encoder_hidden_states": torch.randn(
            1, tokens, model.config.joint_attention_dim, **options
        ),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim, **options),
        "timestep": torch.full((1,), 0.5, device=model.device),
        "guidance": torch.full((1,), 3.5, device=model.device),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(tokens, 3, device=model.device),
        "return_dict": False,
    }


def run_blocks(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    side: int = 45,
    tokens: int = 512,
    **shape: Any,
) -> float:
    """Runs forward and backward; returns the norm of the gradient.

    The ``side`` is in image tokens. The defaults, also of diffusers' transformer, which ``shape``
    changes, are FLUX.1-dev's at 720x720.

    Forces flash attention: with cuDNN's attention, which torch may choose, the backward pass under
    gradient checkpointing has failed at this sequence length.

    Raises:
        ValueError: an output or a gradient is zero or not finite.
    """
    torch.manual_seed(0)
    with torch.device(device):
        transformer = FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, guidance_embeds=True, **shape
        ).to(dtype)
    transformer.enable_gradient_checkpointing()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = transformer(**_inputs(transformer, side, tokens))[0]
        output.float().square().mean().backward()
    norms = torch.stack([p.grad.float().norm() for p in transformer.parameters()])
    norm = float(norms.norm())
    for what, value in (("output", float(output.detach().float().std())), ("gradient", norm)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{what} is {'not finite' if value else 'zero'}")
    return norm


def _measure(index: int) -> dict[str, Any]:
    device = torch.device("cuda", index)
    try:
        run_blocks(device)
        torch.cuda.synchronize(device)
        started = time.monotonic()
        run_blocks(device)
        torch.cuda.synchronize(device)
    except (RuntimeError, ValueError) as error:
        return {"gpu": index, "error": str(error).strip().split("\n")[0]}
    seconds = time.monotonic() - started
    return {"gpu": index, "seconds": seconds, "memory": torch.cuda.max_memory_allocated(device)}


def check_blocks() -> Finding:
    """Runs :func:`run_blocks` on every GPU, in a separate process."""
    started = time.monotonic()
    output, problem = run_module(["reproduce.checks.flux_blocks"], Path.cwd(), LIMIT)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return summarize(lines, problem, time.monotonic() - started)


def summarize(measured: list[dict[str, Any]], problem: str, seconds: float) -> Finding:
    """One finding for all GPUs."""
    problems = [f"GPU {line['gpu']}: {line['error']}" for line in measured if "error" in line]
    problems += [problem] if problem else []
    memory = max((line["memory"] for line in measured if "memory" in line), default=None)
    if problems or not measured:
        return Finding(
            "failed", NAME, "; ".join(problems) or "no measurement",
            "try a newer driver; check with nvidia-smi that the GPU is not in use",
            seconds, memory,
        )  # fmt: skip
    slowest = max(line["seconds"] for line in measured)
    text = f"bfloat16 forward and backward of one double and one single block: {slowest:.2f} s"
    return Finding("ok", NAME, text, "", seconds, memory)


if __name__ == "__main__":
    for number in range(torch.cuda.device_count()):
        sys.stdout.write(json.dumps(_measure(number)) + "\n")
        sys.stdout.flush()
