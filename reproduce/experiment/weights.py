"""The published weights a profile needs, and whether they are cached. No network."""

from g2rpo.hub.catalogue import WEIGHTS, Artifact, catalogue
from g2rpo.hub.lock import read_lock
from g2rpo.hub.status import ArtifactState, artifact_state
from reproduce.experiment.profile import Profile


def needed_weights(profile: Profile) -> tuple[Artifact, ...]:
    """The published artifacts of the profile's policy and rewards."""
    rewards = profile.rewards.values()
    needed = {a.name for c in rewards for a in catalogue().of_reward(c.model, c.source, c.variant)}
    return tuple(
        artifact
        for artifact in catalogue().select([], WEIGHTS)
        if artifact.name in needed
        or (artifact.purpose == "policy" and artifact.repo == profile.policy.source)
    )


def weights_states(profile: Profile) -> list[ArtifactState]:
    """The cache state of each artifact the profile needs."""
    lock = read_lock()
    return [artifact_state(artifact, lock) for artifact in needed_weights(profile)]


def missing_weights(profile: Profile) -> list[ArtifactState]:
    """The profile's weights that are missing from the cache or incomplete."""
    return [state for state in weights_states(profile) if not state.is_whole]


def fetch_advice(profile: str) -> str:
    """How to fetch the weights of a profile."""
    return f"`g2rpo weights fetch --profile {profile}` with network access"
