"""The embedded job: a ViT pretrained on the handwritten digits 0 to 4 is adapted to the digits 5 to 9.

    python launch.py

Data and weights come with the packages: no network, no files. Other methods by `--config.peft.method=lora`, `linear_probe` or
`full`; three seeds by `--config.seeds="(0,1,2)"`.
"""

import ml_collections

from surm_jax.training import base_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration of the job."""
    config = base_config()
    config.model.variant = "digits"
    config.model.checkpoint = "digits"
    config.data.name = "digits_5to9"
    config.data.augment = "shift"
    config.data.batch_size = 64
    config.optim.steps = 800
    config.optim.warmup_steps = 50
    config.optim.learning_rate = {"circulant": 1e-2, "lora": 1e-2, "linear_probe": 1e-2, "full": 1e-3}
    config.log.metrics_every = 100
    config.log.evaluate_every = 250
    return config
