"""The stages that evaluate a cell's policy: sampling held-out images and scoring them."""

from dataclasses import dataclass

from g2rpo.lease import Lease
from reproduce.stages.evaluation_files import EvaluationStage


@dataclass(frozen=True)
class Sample(EvaluationStage):
    """Samples the held-out images of a share, and measures what else needs the policy."""

    kind = "sample"

    def is_done(self) -> bool:
        """Whether its images exist, or existed and have been scored."""
        return self.training.is_recorded() and self.is_sampled()

    def run(self) -> None:
        from reproduce.stages.sampling import sample_share  # slow: model libraries

        sample_share(self)


@dataclass(frozen=True)
class Score(EvaluationStage):
    """Scores the images of a share with every reward model of the profile."""

    kind = "score"

    def is_done(self) -> bool:
        return self.training.is_recorded() and self.is_scored()

    def run(self) -> None:
        from reproduce.stages.scoring import score_share  # slow: model libraries

        score_share(self)
        self.finish()

    def finish(self) -> bool:
        if self.is_merged():
            return True
        count = self.share.count
        if not all(self.of_share(index, count).is_scored() for index in range(count)):
            return False
        from reproduce.stages.scoring import merge_scores  # slow: model libraries

        with Lease.acquire(self.folder / "leases", "finish"):
            if not self.is_merged():
                merge_scores(self)
        return True
