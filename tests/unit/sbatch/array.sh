# train/a
#!/bin/bash

# Parameters
#SBATCH --comment=g2rpo/table1-flux/1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --job-name=g2rpo-train
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/RESULTS/submissions/table1-flux/jobs/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=1440

# setup
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
marker=/RESULTS/submissions/table1-flux/jobs/"$job".requeue
rm -f "$marker"
rm -f /RESULTS/submissions/table1-flux/jobs/"$job"_*_result.pkl.save_tmp
export PYTHONUNBUFFERED=1
export PYTHONPATH=REPOSITORY

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /RESULTS/submissions/table1-flux/jobs/%j_%t_log.out --kill-on-bad-exit=1 PYTHON -u -m submitit.core._submit /RESULTS/submissions/table1-flux/jobs


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

# embed/a
#!/bin/bash

# Parameters
#SBATCH --comment=g2rpo/table1-flux/2
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --job-name=g2rpo-embed
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/RESULTS/submissions/table1-flux/jobs/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=120

# setup
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
marker=/RESULTS/submissions/table1-flux/jobs/"$job".requeue
rm -f "$marker"
rm -f /RESULTS/submissions/table1-flux/jobs/"$job"_*_result.pkl.save_tmp
export PYTHONUNBUFFERED=1
export PYTHONPATH=REPOSITORY

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /RESULTS/submissions/table1-flux/jobs/%j_%t_log.out --kill-on-bad-exit=1 PYTHON -u -m submitit.core._submit /RESULTS/submissions/table1-flux/jobs


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

# sample/a/0, sample/a/1, sample/a/2, sample/a/3, sample/a/4, sample/a/5, sample/a/6, sample/a/7
#!/bin/bash

# Parameters
#SBATCH --array=0-7%4
#SBATCH --comment=g2rpo/table1-flux/3
#SBATCH --cpus-per-task=8
#SBATCH --dependency='afterok:<train/a>:4711,afterany:<embed/a>'
#SBATCH --gpus-per-node=1
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
rm -f /RESULTS/submissions/table1-flux/jobs/"$job"_*_result.pkl.save_tmp
export PYTHONUNBUFFERED=1
export PYTHONPATH=REPOSITORY

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /RESULTS/submissions/table1-flux/jobs/%A_%a_%t_log.out --kill-on-bad-exit=1 PYTHON -u -m submitit.core._submit /RESULTS/submissions/table1-flux/jobs


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
