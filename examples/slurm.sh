#!/bin/bash
# sbatch examples/slurm.sh CONFIG.yaml
# One torchrun a machine; SLURM says which machines there are. CONFIG.yaml has experiment_name and
# auto_resume: true, and an output_dir that all machines share. A SIGTERM before the time is up saves the run.
#SBATCH --job-name=forge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node gpu \
    --max-restarts 3 \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:29400" \
    --rdzv-id "$SLURM_JOB_ID" \
    -m phase5_training train "$1"
