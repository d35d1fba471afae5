"""G2RPO, DanceGRPO and MixGRPO as their released scripts train, to be checked line by line.

One trajectory after the other, one state at a time: nothing is batched, shared or reused, and
nothing of the project is used but its keyed draws, because both sides need the same ones. G, D, M
and F are the papers and codes of docs/mathematics.md. "Ledger" names a row of docs/fidelity.md
where the project does not do what a released script does; this file follows the project there.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import Tensor

from g2rpo import seeds

Reward = Callable[[Tensor, str], float]
"""(uint8 image [H, W, 3], prompt) -> score."""
GroupKey = tuple[str, int | None, int | None]
"""The images that are compared: (prompt id, the step they credit or None for all, granularity)."""
TransitionKey = tuple[str, int, int]
"""(prompt id, sample, step)."""
INITIAL = -1
"""The step that names initial noise."""
RESOLUTION, TEXT_LENGTH, GUIDANCE = 32, 20, 3.5


class Models:
    """FLUX's parts as diffusers loads them."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=dtype)
        self.transformer = self.pipeline.transformer.eval()
        self.vae = self.pipeline.vae
        side = RESOLUTION // self.pipeline.vae_scale_factor
        self.latent_shape = (self.vae.config.latent_channels, side, side)
        self.image_ids = FluxPipeline._prepare_latent_image_ids(
            1, side // 2, side // 2, torch.device("cpu"), dtype
        )

    @torch.no_grad()
    def embed(self, text: str) -> tuple[Tensor, Tensor, Tensor]:
        """The prompt's embeddings, pooled embedding and position ids."""
        return self.pipeline.encode_prompt(text, None, max_sequence_length=TEXT_LENGTH)

    @torch.no_grad()
    def pixels(self, x0: Tensor) -> Tensor:
        """What the autoencoder makes of one image's packed latents: [3, H, W] within about ±1."""
        factor, config = self.pipeline.vae_scale_factor, self.vae.config
        unpacked = FluxPipeline._unpack_latents(x0[None], RESOLUTION, RESOLUTION, factor)
        return self.vae.decode(unpacked / config.scaling_factor + config.shift_factor).sample[0]


Step = Callable[[Tensor, Tensor, Sequence[float], int, float], tuple[Tensor, float]]
"""(x, v, sigmas, k, eta) -> mean and std of the stochastic step from node k to the next."""


def flow_step(
    x: Tensor, v: Tensor, sigma: Sequence[float], k: int, eta: float
) -> tuple[Tensor, float]:
    """F's SDE, as its paper has it; M and G took it over."""
    s, ds = sigma[k], sigma[k + 1] - sigma[k]
    below_one = sigma[1] if k == 0 else s  # F sigma_max; ledger: "Where σ = 1"
    g = eta * math.sqrt(s / (1 - below_one))
    drift = v + g**2 / (2 * s) * (x + (1 - s) * v)
    return x + drift * ds, g * math.sqrt(-ds)


def dance_step(
    x: Tensor, v: Tensor, sigma: Sequence[float], k: int, eta: float
) -> tuple[Tensor, float]:
    """D's ``flux_step``: the ODE step, and the score's part apart."""
    s, ds = sigma[k], sigma[k + 1] - sigma[k]
    x0 = x - s * v
    score = -(x - x0 * (1 - s)) / s**2
    return x + ds * v - 0.5 * eta**2 * score * ds, eta * math.sqrt(-ds)


def log_prob(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """The Gaussian log-density, its mean over the latents; ledger: "Log-probability of a step"."""
    error = x_next - mean
    return (-(error**2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))).mean()


@dataclass(frozen=True)
class Transition:
    """A stochastic step from ``x``, as the rollout left it."""

    prompt: str
    sample: int
    step: int
    x: Tensor
    x_next: Tensor
    log_prob: float

    @property
    def key(self) -> TransitionKey:
        return self.prompt, self.sample, self.step


@dataclass
class Found:
    """What one iteration computed; what has a transition's key is of the trained ones alone."""

    pixels: dict[GroupKey, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    rewards: dict[str, dict[GroupKey, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    logged: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    log_probs: dict[TransitionKey, float] = field(default_factory=dict)
    advantages: dict[TransitionKey, float] = field(default_factory=dict)
    ratios: dict[TransitionKey, float] = field(default_factory=dict)
    gradients: list[Tensor] = field(default_factory=list)
    """Of each optimizer step, after its norm was clipped."""


@dataclass
class Method:
    """What the released scripts have in common; the subclasses are the methods."""

    steps: int
    group_size: int
    eta: float
    learning_rate: float
    updates: int = 1
    """Optimizer steps an iteration, each on its share of every group (D, M)."""
    max_grad_norm: float = 1.0  # --max_grad_norm 1.0
    advantage_clip: float = 5.0  # --adv_clip_max 5.0
    ddof: int = 1  # torch's std
    step_of: Step = flow_step

    def begin(
        self, models: Models, rewards: Mapping[str, Reward], weights: Mapping[str, float], seed: int
    ) -> None:
        """Starts a training from ``models``, which stay as they are."""
        self.models, self.rewards, self.weights, self.seed = models, rewards, weights, seed
        self.transformer = copy.deepcopy(models.transformer)
        self.parameters = list(self.transformer.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, self.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4
        )
        self.iteration = 0
        # G sd3_time_shift. Float32 decides what int() leaves of a time; steps are in float64.
        u = torch.linspace(1, 0, self.steps + 1)
        self.times = [int(1000 * s) / 1000 for s in 3 * u / (1 + 2 * u)]
        shares = [1 - i / self.steps for i in range(self.steps + 1)]
        self.sigma = [3 * u / (1 + 2 * u) for u in shares]

    def iterate(self, prompts: Mapping[str, str]) -> Found:
        """One iteration on the prompts, texts by id: rollouts, advantages, optimizer steps."""
        self.prompts = prompts
        self.texts = {prompt: self.models.embed(text) for prompt, text in prompts.items()}
        self.found, self.transitions = Found(), list[Transition]()
        with torch.no_grad():
            for prompt in prompts:
                self.roll_out(prompt)
        self.trained = [t for t in self.transitions if t.step in self.trained_steps(t)]
        self.found.log_probs = {t.key: t.log_prob for t in self.trained}
        self.found.advantages = {t.key: self.advantage(t) for t in self.trained}
        for update in self.split(self.trained):
            self.update(update)
        self.iteration += 1
        return self.found

    # Rollout

    def roll_out(self, prompt: str) -> None:
        """Makes the transitions and scores the images of one prompt."""
        raise NotImplementedError

    def noise(self, prompt: str, sample: int, step: int) -> Tensor:
        """Standard normal packed latents; ledger: "Random numbers"."""
        stream = "initial-noise" if step == INITIAL else "step-noise"
        shape = self.models.latent_shape
        drawn = seeds.gaussian(shape, self.seed, stream, self.iteration, prompt, sample, step)
        return FluxPipeline._pack_latents(drawn[None], 1, *shape)[0].to(self.models.dtype)

    def velocity(self, x: Tensor, k: int, prompt: str) -> Tensor:
        """The transformer's velocity of one state at node ``k``."""
        embeddings, pooled, text_ids = self.texts[prompt]
        return self.transformer(
            hidden_states=x[None],
            timestep=torch.tensor([self.times[k]], dtype=x.dtype),
            guidance=torch.tensor([GUIDANCE]),
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            txt_ids=text_ids,
            img_ids=self.models.image_ids,
        ).sample[0]

    def ode(self, x: Tensor, here: int, there: int, prompt: str) -> tuple[Tensor, Tensor]:
        """The state at node ``there``, and the x_0 that is predicted at ``here``."""
        v = self.velocity(x, here, prompt)
        return x + v * (self.sigma[there] - self.sigma[here]), x - self.sigma[here] * v

    def sde(self, x: Tensor, k: int, prompt: str, sample: int) -> Tensor:
        """The state at the next node, with noise; kept as a transition."""
        mean, std = self.step_of(x, self.velocity(x, k, prompt), self.sigma, k, self.eta)
        x_next = mean + std * self.noise(prompt, sample, k)
        value = float(log_prob(x_next, mean, std))
        self.transitions.append(Transition(prompt, sample, k, x, x_next, value))
        return x_next

    def score(self, pixels: Tensor, prompt: str) -> dict[str, float]:
        """The rewards of an image, which they see as a PNG holds it."""
        png = ((pixels / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)
        text = self.prompts[prompt]
        return {name: reward(png.permute(1, 2, 0), text) for name, reward in self.rewards.items()}

    def add_image(self, x0: Tensor, group: GroupKey) -> None:
        """Decodes and scores the next sample's image of ``group``."""
        self.found.pixels[group].append(self.models.pixels(x0))
        for name, value in self.score(self.found.pixels[group][-1], group[0]).items():
            self.found.rewards[name][group].append(value)

    # Training

    def trained_steps(self, transition: Transition) -> Iterable[int]:
        """The steps that are trained of this transition's trajectory: all stochastic ones."""
        return [transition.step]

    def weight(self, name: str) -> float:
        """Of a reward's advantages; G adds those of HPS and CLIP as they are."""
        del name
        return 1.0

    def advantage(self, transition: Transition) -> float:
        """Normalised group by group, summed over rewards and granularities, clamped."""
        total = 0.0
        for name in self.rewards:
            for (prompt, step, _), values in self.found.rewards[name].items():
                if prompt == transition.prompt and step in (None, transition.step):
                    r = torch.tensor(values, dtype=torch.float64)
                    normalized = (r - r.mean()) / (r.std(correction=self.ddof) + 1e-8)
                    total += self.weight(name) * float(normalized[transition.sample])
        return min(max(total, -self.advantage_clip), self.advantage_clip)

    def split(self, trained: Sequence[Transition]) -> list[list[Transition]]:
        """What each optimizer step is made of: the next samples of every group (D, M)."""
        share = self.group_size // self.updates
        return [[t for t in trained if t.sample // share == u] for u in range(self.updates)]

    def update(self, transitions: Sequence[Transition]) -> None:
        """One optimizer step on the mean loss; the scripts average over the ranks' prompts."""
        for t in transitions:
            v = self.velocity(t.x, t.step, t.prompt)
            mean, std = self.step_of(t.x, v, self.sigma, t.step, self.eta)
            ratio = torch.exp(log_prob(t.x_next, mean, std) - t.log_prob)
            clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)  # --clip_range 1e-4
            advantage = self.found.advantages[t.key]
            loss = max(-advantage * ratio, -advantage * clipped)
            (loss / len(transitions)).backward()
            self.found.ratios[t.key] = ratio.item()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.found.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters]))
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass
class G2RPO(Method):
    """A deterministic anchor; at each step of M the group branches off it with noise (G)."""

    eta: float = 0.7  # --eta 0.7
    learning_rate: float = 2e-6
    stochastic_steps: Sequence[int] = range(8)  # --eta_step_list 0 1 2 3 4 5 6 7
    granularities: Sequence[int] = (1, 2)  # --granular_list 1 2; ledger: "Granularities"
    per_step: bool = True
    """An optimizer step after each k (the HPS script), or one (HPS & CLIP); in the ledger."""

    def roll_out(self, prompt: str) -> None:
        anchor = [self.noise(prompt, 0, INITIAL)]
        for k in range(self.steps):
            anchor.append(self.ode(anchor[k], k, k + 1, prompt)[0])
        for name, value in self.score(self.models.pixels(anchor[-1]), prompt).items():
            self.found.logged[name].append(value)  # G "## eval reward"
        for k in self.stochastic_steps:
            for sample in range(self.group_size):
                # Not rounded to bf16; ledger: "Velocity at the branching point".
                branch = self.sde(anchor[k], k, prompt, sample)
                for granularity in self.granularities:
                    # sigma_schedule[:eta_step + 2], then sigma_schedule[eta_step + 2::g]
                    nodes = [*range(k + 2), *range(k + 2, self.steps + 1, granularity)]
                    x = branch
                    for here, there in pairwise(nodes[k + 1 :]):
                        x, x0 = self.ode(x, here, there, prompt)
                    self.add_image(x0, (prompt, k, granularity))

    def split(self, trained: Sequence[Transition]) -> list[list[Transition]]:
        if not self.per_step:
            return [list(trained)]
        return [[t for t in trained if t.step == k] for k in self.stochastic_steps]


@dataclass
class DanceGRPO(Method):
    """Noise at every step, a random part of the steps trained (D)."""

    eta: float = 0.3  # --eta 0.3
    learning_rate: float = 1e-5
    updates: int = 3  # on 16 GPUs: 4 of 12 samples each
    step_of: Step = dance_step

    def roll_out(self, prompt: str) -> None:
        for sample in range(self.group_size):
            x = self.noise(prompt, 0, INITIAL)  # --init_same_noise; ledger: "Initial noise"
            for k in range(self.steps - 1):
                x = self.sde(x, k, prompt, sample)
            # Without the last step's noise, which reaches no image; ledger: "Last transition".
            _, x0 = self.ode(x, self.steps - 1, self.steps, prompt)
            self.add_image(x0, (prompt, None, None))

    def trained_steps(self, transition: Transition) -> Iterable[int]:
        trainable = self.steps - 1
        key = (self.iteration, transition.prompt, transition.sample)
        order = seeds.permutation(trainable, self.seed, "trained-steps", *key)
        return order[: int(trainable * 0.6)]  # --timestep_fraction 0.6


@dataclass
class MixGRPO(Method):
    """Noise in a window of steps that slides, all of which are trained (M)."""

    eta: float = 0.7
    learning_rate: float = 1e-5
    updates: int = 4  # 3 of 12 samples each
    stride: int = 1  # --prog_overlap_step 1
    interval: int = 25  # iters_per_group=25

    def roll_out(self, prompt: str) -> None:
        start = self.iteration // self.interval * self.stride
        window = range(start, min(start + 4, self.steps - 2))  # group_size=4
        for sample in range(self.group_size):
            x = self.noise(prompt, 0, INITIAL)  # --init_same_noise
            for k in range(self.steps):
                if k in window:
                    x = self.sde(x, k, prompt, sample)
                else:
                    x, x0 = self.ode(x, k, k + 1, prompt)
            self.add_image(x0, (prompt, None, None))

    def weight(self, name: str) -> float:
        return self.weights[name] / sum(self.weights.values())  # advantage_aggr


@dataclass
class MixGRPOFlash(MixGRPO):
    """Fewer nodes after the window, which stays at steps 0 to 3, by DPM-Solver++ (M)."""

    ratio: float = 0.4  # dpm_post_compress_ratio

    def roll_out(self, prompt: str) -> None:
        steps, points = self.steps, int((self.steps - 3) * self.ratio)
        # Their places in the lists of levels follow those of the grid.
        after = range(steps + 1, steps + 1 + points)
        start = torch.linspace(1, 0, steps + 1)[4].item()
        u = torch.linspace(start, 0, points)  # float32 for the times again
        times = [int(1000 * s) / 1000 for s in 3 * u / (1 + 2 * u)]
        u = torch.linspace(1 - 4 / steps, 0, points, dtype=torch.float64)
        self.times = self.times[: steps + 1] + times
        self.sigma = self.sigma[: steps + 1] + (3 * u / (1 + 2 * u)).tolist()
        half_snr = [math.log((1 - s) / s) if 0 < s < 1 else math.nan for s in self.sigma]
        for sample in range(self.group_size):
            x, before, earlier = self.noise(prompt, 0, INITIAL), 3, torch.empty(0)
            for k in range(4):
                _, earlier = self.ode(x, k, k + 1, prompt)
                x = self.sde(x, k, prompt, sample)
            for here, there in pairwise(after[:-1]):  # dpm_solver_order=2, "midpoint"
                _, x0 = self.ode(x, here, there, prompt)
                h, h0 = half_snr[there] - half_snr[here], half_snr[here] - half_snr[before]
                slope = (x0 - earlier) * h / h0
                x = x * self.sigma[there] / self.sigma[here]
                x = x - (1 - self.sigma[there]) * (math.exp(-h) - 1) * (x0 + slope / 2)
                before, earlier = here, x0
            _, x0 = self.ode(x, after[-2], after[-1], prompt)  # lower_order_final
            self.add_image(x0, (prompt, None, None))
