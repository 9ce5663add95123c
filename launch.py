"""Fine-tune a pretrained model: `python launch.py --config=configs/digits.py`.

Any value of the configuration can be given on the command line: `--config.peft.method=lora`. A run writes everything to
its folder (`--workdir`). If it is interrupted, the same command resumes it.
"""

from surm_jax.__main__ import run

if __name__ == "__main__":
    run()
