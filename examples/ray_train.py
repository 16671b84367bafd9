"""An example only: the run of a YAML file as a Ray Train job. Not tested here; Ray is no dependency.

    python examples/ray_train.py CONFIG.yaml 8

Ray starts one process a worker and sets the environment that torchrun would; the rest is the same.
"""

import sys

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(options: dict) -> None:
    """Train in one of Ray's workers."""
    from phase5_training.commands import train as forge_train

    result = forge_train(options["config"], {"progress": "quiet"})
    print(result.metrics)


if __name__ == "__main__":
    TorchTrainer(
        train,
        train_loop_config={"config": sys.argv[1]},
        scaling_config=ScalingConfig(num_workers=int(sys.argv[2]), use_gpu=True),
        run_config=RunConfig(name="forge"),
    ).fit()
