"""The commands of docs/llama.md, run on a real Llama with 260 thousand parameters."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "llama.md").read_text()
COMMANDS = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ").splitlines()


@pytest.mark.exhaustive
def test_the_commands_of_the_page(shared, tmp_path):
    places = {"LLAMA": str(shared / "data/weights/stories260k"), "launch.py": str(ROOT / "launch.py")}
    (example,) = re.findall(r"```json\n(.*?)\n```", PAGE)
    (tmp_path / "lines.jsonl").write_text(
        "".join(example.replace("Lily", name) + "\n" for name in ("Lily", "Tom", "Ben", "Sue") for _ in range(8))
    )
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": json.loads(example)["prompt"]}) + "\n")
    assert len(COMMANDS) == 7
    for command in COMMANDS:
        words = [sys.executable, *shlex.split(command)[1:]]
        for old, new in places.items():
            words = [word.replace(old, new) for word in words]
        if "--mode" not in command:
            words += ["--config.mesh.data=1", "--config.optim.learning_rate.lora=0.01", "--config.optim.epochs=20.0"]
        done = subprocess.run(
            words, cwd=tmp_path, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    (answer,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert answer["line"] == 1 and answer["answer"]
    assert answer["tokens"] == 30 if answer["finish"] == "length" else answer["tokens"] < 30
    written = {str(path.relative_to(tmp_path / "RUN")) for path in (tmp_path / "RUN").rglob("*.safetensors")}
    expected = {"merged/model", "hf/model", "peft/adapter_model", "adapter/adapter_model"}
    assert {f"{name}.safetensors" for name in expected} <= written
