"""Pretrains the small ViT that the package ships, on the handwritten digits 0 to 4, from nothing.

    python experiments/pretrain_digits.py

Writes `surm_jax/pretrained/weights/vit_digits.safetensors`. `configs/digits.py` adapts it to the digits 5 to 9, of which it has
seen none. The run itself is an ordinary full fine-tuning from random weights, in `runs/pretrain_digits`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs import digits
from surm_jax.pretrained.sources import DIGITS_WEIGHTS
from surm_jax.training import parse
from surm_jax.training.modes import merge_run, train_run

WORKDIR = Path("runs/pretrain_digits")


def main() -> None:
    """Trains and writes the weights."""
    config = digits.get_config()
    config.model.checkpoint = "none"
    config.data.name = "digits_0to4"
    config.peft.method = "full"
    config.optim.steps = 2000
    config.optim.learning_rate.full = 1e-3
    config.optim.groups.rest.weight_decay = 0.05
    config.optim.label_smoothing = 0.1
    train_run(parse(config), WORKDIR)
    (path,) = merge_run(WORKDIR)
    path.replace(DIGITS_WEIGHTS)
    print(f"moved to {DIGITS_WEIGHTS} ({DIGITS_WEIGHTS.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
