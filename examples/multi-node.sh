#!/bin/sh
# The same command on each of N machines; they meet at one of them. Machines may be 2 to 4 here: when one is
# lost, the others go on from the last checkpoint.
# Usage: examples/multi-node.sh FIRST_MACHINE:29400 CONFIG.yaml
# CONFIG.yaml has experiment_name and auto_resume: true, and an output_dir that all machines share.
exec torchrun \
    --nnodes 2:4 \
    --nproc-per-node gpu \
    --max-restarts 10 \
    --rdzv-backend c10d \
    --rdzv-endpoint "$1" \
    --rdzv-id forge \
    -m phase5_training train "$2"
