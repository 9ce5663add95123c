"""`generation_config.json`: what is followed, and what is refused."""

import json

import pytest

from surm_jax.errors import UserError
from surm_jax.generation import GENERATION_NAME, Sampling, Settings, read_settings


def read(folder, fields):
    (folder / GENERATION_NAME).write_text(json.dumps(fields))
    return read_settings(folder)


def test_the_defaults_are_those_of_transformers(tmp_path):
    assert read_settings(tmp_path) == Settings() == read(tmp_path, {})
    assert read(tmp_path, {"temperature": 0.6, "eos_token_id": 2}) == Settings(end_tokens=(2,))
    followed = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 3], "max_new_tokens": 9, "pad_token_id": 0}
    sampling = Sampling(temperature=0.6, top_k=50)
    assert read(tmp_path, followed) == Settings(sampling=sampling, end_tokens=(2, 3), max_new_tokens=9)


def test_what_transformers_writes_is_read(tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers: requirements-peers.txt")
    config = transformers.GenerationConfig(do_sample=True, top_p=0.9, top_k=7, eos_token_id=2, max_length=99)
    config.save_pretrained(tmp_path)
    sampling = Sampling(temperature=1.0, top_k=7, top_p=0.9)
    assert read_settings(tmp_path) == Settings(sampling=sampling, end_tokens=(2,), max_new_tokens=None)
    assert all(
        name in vars(config) or name == "transformers_version"
        for name in json.loads((tmp_path / GENERATION_NAME).read_text())
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 4}, "num_beams=4, which cannot be followed"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1, which cannot be followed"),
        ({"temprature": 1.0}, "unknown setting 'temprature'.*temperature"),
        ({"do_sample": "yes"}, "must be true or false"),
        ({"do_sample": True, "top_p": 2}, "top_p must be"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>', which must be"),
        ({"max_length": 0}, "max_length=0, which must be"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, fields)
