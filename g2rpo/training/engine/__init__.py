"""How the trained weights are held, stepped and saved: whole, with float32 masters, or sharded."""

from g2rpo.training.engine.build import build_optimizer, build_weights
from g2rpo.training.engine.weights import TrainedWeights

__all__ = ["TrainedWeights", "build_optimizer", "build_weights"]
