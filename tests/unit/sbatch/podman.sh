# sample/a
#!/bin/bash

# Parameters
#SBATCH --comment=g2rpo/table1-flux/1
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
rm -f /RESULTS/submissions/table1-flux/jobs/"$job"_*_result.pkl.save_tmp
export PYTHONUNBUFFERED=1
export PYTHONPATH=REPOSITORY
export HF_HOME=/weights

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /RESULTS/submissions/table1-flux/jobs/%j_%t_log.out --kill-on-bad-exit=1 podman run --rm --network=host --ipc=host --entrypoint '' --user 0:0 --device nvidia.com/gpu=all --volume REPOSITORY:REPOSITORY --volume /RESULTS:/RESULTS --volume /weights:/weights --volume /data:/inside --env 'SLURM*' --env 'SUBMITIT*' --env 'MASTER*' --env 'G2RPO*' --env PYTHONPATH --env PYTHONUNBUFFERED --env HF_HOME --workdir REPOSITORY --device 'all GPUs' /images/g2rpo.sif python3 -u -m submitit.core._submit /RESULTS/submissions/table1-flux/jobs


# teardown
code=$?
again=
[ -e "$marker" ] && again=yes
[ "$code" = 140 ] && again=yes
details=$(scontrol show job --oneliner "$job")
[ "$code" = 143 ] && [[ "$details" = *PreemptTime=[0-9]* ]] && again=yes
rm -f "$marker"
[ "${SLURM_RESTART_COUNT:-0}" -ge 100 ] && again=
state=$(squeue --noheader --jobs="$job" --format=%T)
if [ -n "$again" ] && [ "$state" = RUNNING ]; then
  for _ in 1 2 3 4 5; do scontrol requeue "$job" && break; sleep 10; done
fi
exit "$code"
