# train/a
#!/bin/bash

# Parameters
#SBATCH --account=project
#SBATCH --comment=g2rpo/table1-flux/1/train/a
#SBATCH --constraint=a100-80g
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --gres=gpu:a100:8
#SBATCH --job-name=g2rpo-train
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL,TIME_LIMIT
#SBATCH --mail-user=me@example.org
#SBATCH --mem=960GB
#SBATCH --nice=100
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/RESULTS/submissions/table1-flux/jobs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=normal
#SBATCH --reboot
#SBATCH --requeue
#SBATCH --reservation='a course'
#SBATCH --signal=USR2@600
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
srun --unbuffered --output /RESULTS/submissions/table1-flux/jobs/%j_%t_log.out --kill-on-bad-exit=1 PYTHON -u -m slurm.job /RESULTS/submissions/table1-flux train/a


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
[ "${SLURM_RESTART_COUNT:-0}" -ge 3 ] && again=
for _ in 1 2 3 4 5; do
  [ -n "$again" ] || break
  state=$(answer squeue --noheader --jobs="$job" --format=%T | tail -n 1)
  [ "$state" = RUNNING ] || break
  scontrol requeue "$job" && break
  sleep 10
done
exit "$code"
