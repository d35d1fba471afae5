"""The stages that evaluate a cell's policy: sampling held-out images and scoring them."""

from dataclasses import dataclass

from g2rpo.lease import Lease
from reproduce.stages.evaluation_files import EvaluationStage


@dataclass(frozen=True)
class Sample(EvaluationStage):
    """Samples the held-out images of a share, and what else the policy is needed for."""

    kind = "sample"

    def is_done(self) -> bool:
        """Whether its images are there, or were until they had been scored."""
        return self.training.is_recorded() and self.is_sampled()

    def run(self) -> None:
        """Samples what is not there."""
        from reproduce.stages.sampling import sample_share  # start-up time: model libraries

        sample_share(self)


@dataclass(frozen=True)
class Score(EvaluationStage):
    """Scores the images of a share with every judge of the profile."""

    kind = "score"

    def is_done(self) -> bool:
        """Whether all of them are scored."""
        return self.training.is_recorded() and self.is_scored()

    def run(self) -> None:
        """Scores them; puts the scores of all shares together once they are there."""
        from reproduce.stages.scoring import score_share  # start-up time: model libraries

        score_share(self)
        self.finish()

    def finish(self) -> bool:
        """Puts the scores together once all shares are scored; returns whether they are."""
        if self.is_merged():
            return True
        count = self.share.count
        if not all(self.of_share(index, count).is_scored() for index in range(count)):
            return False
        from reproduce.stages.scoring import merge_scores  # start-up time: model libraries

        with Lease.acquire(self.folder / "leases", "finish"):
            if not self.is_merged():
                merge_scores(self)
        return True
