"""The published weights a profile needs, and whether they are cached. No network."""

from g2rpo.hub.catalogue import WEIGHTS, Artifact, catalogue
from g2rpo.hub.lock import read_lock
from g2rpo.hub.status import ArtifactState, artifact_state
from reproduce.experiment.profile import Profile


def needed_weights(profile: Profile) -> tuple[Artifact, ...]:
    """The published artifacts of the profile's policy and rewards."""
    published = catalogue().select([], WEIGHTS)
    return tuple(artifact for artifact in published if _needs(profile, artifact))


def _needs(profile: Profile, artifact: Artifact) -> bool:
    if artifact.purpose == "policy":
        return profile.policy.source == artifact.repo
    return any(
        config.model == artifact.reward
        and config.source in (None, artifact.repo)
        and (artifact.variant in (None, config.variant) if config.variant else artifact.default)
        for config in profile.rewards.values()
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
