# sample/a/0, sample/a/1, sample/a/2, sample/a/3, sample/a/4, sample/a/5, sample/a/6, sample/a/7
#!/bin/bash

# Parameters
#SBATCH --array=0-7%4
#SBATCH --comment='g2rpo/table1-flux/3/sample/a/{0,1,2,3,4,5,6,7}'
#SBATCH --cpus-per-task=8
#SBATCH --dependency='afterok:<train/a>:4711,afterany:<embed/a>'
#SBATCH --gpus-per-node=h100:1
#SBATCH --job-name=g2rpo-sample
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/RESULTS/submissions/table1-flux/jobs/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=240

# setup
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
marker=/RESULTS/submissions/table1-flux/jobs/"$job".requeue
rm -f "$marker"
export PYTHONUNBUFFERED=1
export PYTHONPATH=REPOSITORY

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /RESULTS/submissions/table1-flux/jobs/%A_%a_%t_log.out --kill-on-bad-exit=1 PYTHON -u -m slurm.job /RESULTS/submissions/table1-flux sample/a/0 sample/a/1 sample/a/2 sample/a/3 sample/a/4 sample/a/5 sample/a/6 sample/a/7


# teardown
code=$?
again=
[ -e "$marker" ] && again=yes
[ "$code" = 140 ] && again=yes
deadline=$((SECONDS + 1800))
answer() {
  local pause=1 reply
  until reply=$(timeout 60 "$@" 2>&1); do
    [ "$?" = 127 ] || [[ "$reply" = *"nvalid job id"* ]] && break
    [ "$SECONDS" -lt "$deadline" ] || break
    sleep "$pause"
    pause=$((pause < 16 ? 2 * pause : 30))
  done
  echo "$reply"
}
if [ "$code" = 143 ]; then
  details=$(answer scontrol show job --oneliner "$job")
  [[ "$details" = *PreemptTime=[0-9]* ]] && again=yes
fi
rm -f "$marker"
[ "${SLURM_RESTART_COUNT:-0}" -ge 100 ] && again=
for _ in 1 2 3 4 5; do
  [ -n "$again" ] || break
  state=$(answer squeue --noheader --jobs="$job" --format=%T | tail -n 1)
  [ "$state" = RUNNING ] || break
  scontrol requeue "$job" && break
  sleep 10
done
exit "$code"
