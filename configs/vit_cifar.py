r"""The configuration of a job that adapts ViT-B/16 (ImageNet-21k, AugReg) to CIFAR-10.

The settings are those of SURM (arXiv 2406.17740, section 5): Adam with the learning rate 5e-5, batch size 64, 20,000
steps, and circulant updates of the query, key and value kernels.

    python launch.py --config=configs/vit_cifar.py --config.data.dir=FOLDER_OF_PREPARED_TFDS_SETS

The weights are downloaded once. To try the job without them, train a small model on 32 x 32 pixels from random weights:

    python launch.py --config=configs/vit_cifar.py --config.model.variant=mini --config.model.checkpoint=none \
        --config.peft.method=full --config.optim.learning_rate.full=1e-3 --config.optim.warmup_ratio=0.15 \
        --config.optim.steps=300 --config.data.dir=FOLDER_OF_PREPARED_TFDS_SETS
"""

import ml_collections

from surm_jax.training import base_config


def get_config() -> ml_collections.ConfigDict:
    """Return the default configuration with the values of this job."""
    config = base_config()
    config.model.variant = "B/16"
    config.model.checkpoint = "augreg"
    config.model.num_classes = 10
    config.data.name = "cifar10"
    config.data.batch_size = 64
    config.optim.steps = 20_000
    config.optim.decay = "constant"
    config.optim.clip_norm = 0.0
    config.optim.learning_rate.update({"circulant": 5e-5, "lora": 5e-5, "linear_probe": 1e-3, "full": 5e-5})
    config.log.evaluate_every = 2_000
    config.log.checkpoint_every = 500
    return config
