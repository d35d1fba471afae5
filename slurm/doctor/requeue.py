"""What happens to a job that is stopped before its end: requeueing, preemption, time to save."""

from collections.abc import Iterator, Mapping

from slurm.doctor.finding import Case, Finding
from slurm.doctor.site import Site, number_of
from slurm.times import seconds_of

SENDS_SIGNAL = "preempt_send_user_signal"
LOST = "it goes on from its last periodic checkpoint: up to checkpoints.every_minutes are lost"


def requeueing(case: Case, site: Site) -> Iterator[Finding]:
    """Whether jobs may be started again."""
    usual = site.config.get("JobRequeue") == "1"
    text = "the site's default" if usual else "off unless a job asks for it, which these do"
    yield Finding("ok", "requeueing", f"{text}; {case.cluster.max_restarts} times at most")


def preemption(case: Case, site: Site) -> Iterator[Finding]:
    """What a job of higher priority does to ours."""
    kind = site.config.get("PreemptType", "").removeprefix("preempt/")
    for name in dict.fromkeys(p for each in case.partitions for p in site.names(each)):
        what = f"preemption in {name}"
        mode, grace = _mode(case, site, kind, name)
        if kind in ("", "none", "(null)") or mode in ("OFF", ""):
            yield Finding("ok", what, "off")
        elif mode == "REQUEUE":
            yield _requeue(case, site, what, grace)
        elif mode == "CANCEL":
            yield Finding(
                "warning",
                what,
                "a preempted job is cancelled and not started again",
                "run the same command again, or name a partition or qos without preemption",
            )
        else:
            yield Finding("ok", what, f"{mode.lower()}: a job waits in memory and goes on")


def _mode(case: Case, site: Site, kind: str, partition: str) -> tuple[str, int]:
    """The mode of preemption of our jobs in a partition, and the seconds they have to save."""
    values: Mapping[str, str] = site.partitions[partition]
    common = site.config.get("PreemptMode", "OFF")
    mode, grace = values.get("PreemptMode") or common, number_of(values.get("GraceTime")) or 0
    if kind == "qos" and site.accounts is not None:
        qos = site.accounts.qos.get(case.cluster.qos or "normal", {})
        own = qos.get("PreemptMode") or "cluster"
        mode = common if own == "cluster" else own
        grace = seconds_of(qos.get("GraceTime", "")) or 0
    words = [word.strip().upper() for word in mode.split(",")]
    return next((word for word in words if word != "GANG"), "OFF"), grace


def _requeue(case: Case, site: Site, what: str, grace: int) -> Finding:
    lead = case.cluster.signal_lead_seconds
    if not site.has_option("SlurmctldParameters", SENDS_SIGNAL):
        return Finding(
            "warning",
            what,
            f"a preempted job is requeued without being asked to save; {LOST}",
            f"the site: SlurmctldParameters={SENDS_SIGNAL} and a GraceTime; else lower "
            "checkpoints.every_minutes",
        )
    if grace < lead:
        return Finding(
            "warning",
            what,
            f"a preempted job has {grace} s (GraceTime) to save where signal_lead_seconds is "
            f"{lead}; where that is too short {LOST}",
            f"the site: GraceTime={lead}; or lower signal_lead_seconds to what saving takes",
        )
    return Finding("ok", what, f"a preempted job is asked to save, has {grace} s, and is requeued")


def cancelling(_case: Case, site: Site) -> Iterator[Finding]:
    """How long a cancelled job has to save."""
    wait = seconds_of(site.config.get("KillWait", "")) or 0
    yield Finding("ok", "cancelling", f"a cancelled job has {wait} s (KillWait) to save")
