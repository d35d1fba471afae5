"""The CPU's blocks against diffusers' own."""

from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from benchmarks.mini_world import build
from g2rpo.policy import LoraConfig, Policy, PolicyConfig, load_policy
from g2rpo.policy.cpu_blocks import gelu

ASSETS = Path(build.__file__).parent / "assets"


def velocity_and_gradient(policy: Policy) -> list[Tensor]:
    """Of five states at different times, with the gradient of every trained parameter."""
    conditioning = policy.encode(["a red circle", "a small blue square above a green star"])
    generator = torch.Generator().manual_seed(1)
    latents = policy.pack(torch.randn(5, *policy.latent_shape, generator=generator))
    chosen = conditioning.select([0, 1, 0, 1, 1])
    velocity = policy.velocity(latents, torch.linspace(0.1, 0.9, 5), chosen)
    trained = [p for p in policy.transformer.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(velocity.square().mean(), trained)
    with torch.no_grad():
        alone = policy.velocity(latents, torch.linspace(0.1, 0.9, 5), chosen)
    return [velocity.detach(), alone, torch.cat([g.flatten() for g in gradients])]


def mini_policy() -> Policy:
    config = PolicyConfig(source=str(ASSETS / "policy"), resolution=32, max_sequence_length=20)
    return load_policy(config, "cpu")


def test_velocities_and_gradients_are_those_of_diffusers() -> None:
    for lora in (None, LoraConfig(rank=4, alpha=8.0)):
        found = []
        for own in (False, True):
            policy = mini_policy()
            if own:
                folder = ASSETS / "policy" / "transformer"
                policy.transformer = FluxTransformer2DModel.from_pretrained(folder)
            if lora is not None:
                policy.add_lora(lora)
                generator = torch.Generator().manual_seed(2)
                for name, parameter in policy.transformer.named_parameters():
                    if "lora_B" in name:  # zero before training
                        parameter.data.normal_(0, 0.05, generator=generator)
            found.append(velocity_and_gradient(policy))
        for ours, theirs in zip(*found, strict=True):
            assert theirs.std() > 0
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_a_trained_transformer_is_saved_as_diffusers_saves_it(tmp_path: Path) -> None:
    mini_policy().save_transformer(tmp_path / "transformer")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    own = FluxTransformer2DModel.from_pretrained(ASSETS / "policy" / "transformer")
    assert again.config["num_layers"] == own.config["num_layers"]
    for one, two in zip(again.parameters(), own.parameters(), strict=True):
        assert torch.equal(one, two)


def test_gelu_has_the_value_and_gradient_of_the_formula() -> None:
    x = torch.linspace(-9, 9, 181, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(gelu(x), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(gelu(x.detach()), expected.detach(), rtol=0, atol=1e-14)
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (gelu(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
