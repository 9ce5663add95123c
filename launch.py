"""Fine-tune a pretrained model: `python launch.py --config=configs/digits.py`.

Any value of the configuration can be given on the command line: `--config.peft.method=lora`. A run leaves everything in
its folder (`--workdir`); the same command resumes a run that was interrupted.
"""

from surm_jax.__main__ import run

if __name__ == "__main__":
    run()
