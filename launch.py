"""Fine-tune a pretrained model: `python launch.py --config=configs/digits.py`.

Any value of the configuration can be given on the command line: `--config.peft.method=lora`. A run writes everything to
its folder (`--workdir`). If it is interrupted, the same command resumes it.
"""

import signal
import sys

if __name__ == "__main__":
    # While libraries are imported, Ctrl-C ends the program at once. Python's own handler would raise an exception
    # somewhere in a half-loaded library, and not every library passes it on. `run` sets Python's handler again.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from surm_jax.__main__ import run
    except ImportError as error:  # A library is missing or too old.
        sys.exit(f"error: {error}")
    run()
