# sample/a
#!/bin/bash

# Parameters
#SBATCH --comment=g2rpo/table1-flux/1/sample/a
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --job-name=g2rpo-sample
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/RESULTS/submissions/table1-flux/jobs/%j_0_log.out
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
export HF_HOME='/shared/hub of all'
export MASTER_PORT=29501
module purge
module load apptainer

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /RESULTS/submissions/table1-flux/jobs/%j_%t_log.out --kill-on-bad-exit=1 apptainer exec --nv --bind REPOSITORY:REPOSITORY --bind /RESULTS:/RESULTS --bind /weights:/weights --bind /data:/inside --pwd REPOSITORY --no-home /images/g2rpo.sif python3 -u -m slurm.job /RESULTS/submissions/table1-flux sample/a


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
