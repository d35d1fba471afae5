"""Linear layers in 8-bit floating point, for continuations.

Weights and inputs are rounded to float8_e4m3fn, with one scale per output row of the weight and per
token of the input. On GPUs with float8 tensor cores (capability 8.9 or higher) the product is
``torch._scaled_mm``; elsewhere it is emulated: the same rounding, then a product of the rounded
values in the input's dtype. The two differ in the accumulation (narrower than float32 in tensor
cores) and in the rounding to bfloat16.

torchao's float8 layers require such kernels, so their effect on rewards could not be measured on
the mini world.
"""

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = float(torch.finfo(FP8).max)
MULTIPLE = 16
"""``torch._scaled_mm`` requires sizes that are multiples of this."""
SMALLEST_SCALE = 1e-12


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` [..., K] as float8 values times float32 scales [..., 1]."""
    largest = rows.abs().amax(dim=-1, keepdim=True).float()
    scale = (largest / LARGEST).clamp(min=SMALLEST_SCALE)
    scaled = (rows.float() / scale).clamp(-LARGEST, LARGEST)
    return scaled.to(FP8), scale


def has_fp8_kernels(device: torch.device) -> bool:
    """Whether the device has float8 matrix products."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def fits(linear: nn.Linear) -> bool:
    """Whether the kernel supports the layer's sizes."""
    return linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0


class Fp8Linear(nn.Module):
    """A frozen linear layer with a float8 product.

    Attributes:
        quantised: the weight [out, in] in float8.
        scale: [out, 1] float32.
        bias: shared with the original layer.
    """

    quantised: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        rounded, scale = quantise(weight.detach())
        self.register_buffer("quantised", rounded, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_parameter("bias", bias)
        self.kernel = has_fp8_kernels(weight.device)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Quantises the layer's current weight [out, in] again."""
        rounded, scale = quantise(weight)
        self.quantised.copy_(rounded)
        self.scale.copy_(scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of ``inputs``."""
        rounded, scale = quantise(inputs.flatten(0, -2))
        product = self._multiply if self.kernel else self._emulate
        result = product(rounded, scale, inputs.dtype)
        return result.view(*inputs.shape[:-1], -1)

    def _multiply(self, rounded: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        # Row-wise scales require a bfloat16 result.
        result = torch._scaled_mm(  # noqa: SLF001 - functional.scaled_mm is not tried yet
            rounded,
            self.quantised.t(),
            scale_a=scale,
            scale_b=self.scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ).to(dtype)
        return result if self.bias is None else result + self.bias

    def _emulate(self, rounded: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        inputs = rounded.to(wide) * scale
        weight = self.quantised.to(wide) * self.scale
        result = nn.functional.linear(inputs.to(wide), weight.to(wide)).to(dtype)
        return result if self.bias is None else result + self.bias
