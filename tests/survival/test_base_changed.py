"""Check that a run is not evaluated or resumed if the weights of its base model have changed since it began."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from surm_jax.errors import UserError
from surm_jax.training.modes import evaluate_run, train_run
from tests.training import tiny


@pytest.mark.exhaustive
def test_weights_that_changed_since_the_run_began(tiny_files, tmp_path):
    files = tmp_path / "files"
    shutil.copytree(tiny_files, files)
    config = tiny.make_config(files, "circulant", **{"optim.steps": 2})
    result = train_run(config, tmp_path / "run")
    kernel = load_file(files / "weights.safetensors")["blocks/0/attention/query/kernel"]
    changed = kernel.copy()
    changed.flat[34] = np.nextafter(changed.flat[34], np.float32(1))
    content = (files / "weights.safetensors").read_bytes()
    (tmp_path / "other.safetensors").write_bytes(content.replace(kernel.tobytes(), changed.tobytes()))
    checkpoint = tmp_path / "run" / "checkpoints" / "2"
    message = (
        "the base model is not the one that {} was trained on: other shapes or values in blocks/0/attention/query/"
    )
    elsewhere = {"model.checkpoint": str(tmp_path / "other.safetensors")}
    moved = tiny.make_config(files, "circulant", **{"optim.steps": 2, **elsewhere})
    with pytest.raises(UserError, match=message.format(f"the adapter {tmp_path / 'run' / 'adapter'}")):
        evaluate_run(tmp_path / "run", elsewhere)
    # Delete the result, so that the next start resumes the run from its last checkpoint.
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match=message.format(f"the checkpoint {checkpoint}")):
        train_run(moved, tmp_path / "run")
    # The same weights at another path are accepted.
    shutil.copy(files / "weights.safetensors", tmp_path / "other.safetensors")
    assert train_run(moved, tmp_path / "run")["metrics"] == result["metrics"]
