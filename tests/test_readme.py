"""Tests of README.md and docs/guide.md: the Python code runs, and the keys and flags of the commands exist."""

import ast
import re
import tomllib
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

import surm_jax
from configs.digits import get_config
from surm_jax import __main__ as launch
from surm_jax.models import ViT, ViTConfig
from surm_jax.pretrained import save_huggingface
from surm_jax.training.parsing import base_config, keys, parse
from surm_jax.training.setup import prepare

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
PAGES = README + GUIDE


class Model(nnx.Module):
    """A small model with attention layers, in place of the user's model in the code of the README."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attention(x))


def code(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_all_python_of_the_pages_is_run_here():
    assert (len(code("python")), len(code("python", GUIDE))) == (2, 5)


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 100


def test_your_own_model_and_several_adapters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"model": Model(nnx.Rngs(0)), "base_model": Model(nnx.Rngs(0))}
    (first, second), (several, *_) = code("python"), code("python", GUIDE)
    begin, save = first.rstrip().rsplit("\n", 1)
    names["batches"] = [(jnp.ones((2, 4, 8)), jnp.zeros((2, 4), int))] * 2
    with jax.numpy_dtype_promotion("standard"):  # Adam counts its steps as an integer.
        exec(begin, names)
    trained = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(names["trainable"])]
    assert trained == [
        *(f"attention/{layer}/delta/default/{r}" for layer in ("query", "value") for r in ("r1", "r2")),
        "head/bias",
        "head/kernel",
    ]
    # The update of a new adapter is zero, so an error in saving or loading it would not change the outputs. Therefore
    # make its parameters random.
    rng = np.random.default_rng(0)
    learn = lambda a: a + jnp.asarray(0.7 * rng.normal(size=a.shape), a.dtype)  # noqa: E731
    names["trainable"] = jax.tree.map(learn, names["trainable"])
    exec(save, names)
    x, deltas = jnp.asarray(rng.normal(size=(3, 4, 8)), jnp.float32), names["trainable"]["attention"]
    learned = {name: circulant(deltas[name]["delta"]["default"]) for name in ("query", "value")}
    expected = with_kernels(names["base_model"], names["trainable"]["head"], learned)(x)
    assert np.abs(expected - with_kernels(names["base_model"], names["trainable"]["head"], {})(x)).max() > 1e-2
    assert np.abs(expected - names["base_model"](x)).max() > 1e-2

    exec(second, names)
    assert "attention/query" in capsys.readouterr().out
    for name in ("model", "plain"):
        np.testing.assert_allclose(names[name](x), expected, rtol=1e-5, atol=1e-5)
    assert surm_jax.adapter_names(names["plain"]) == ()

    names |= {"x": x, "ids": jnp.array([1, 0, 1])}
    exec(several, names)
    np.testing.assert_allclose(names["y"], expected, rtol=1e-5, atol=1e-5)
    halved = {name: M / 2 for name, M in learned.items()}
    expected = with_kernels(names["base_model"], names["trainable"]["head"], halved)(x)
    np.testing.assert_allclose(names["model"](x), expected, rtol=1e-5, atol=1e-5)
    assert surm_jax.adapter_names(names["low_rank"]) == ("converted",)
    errors, (converted, _) = {}, surm_jax.merge(names["low_rank"])
    for name, M in halved.items():
        kernels = (np.asarray(getattr(m.attention, name).kernel[...]) for m in (converted, names["base_model"]))
        found, S = np.subtract(*kernels).reshape(M.shape), np.linalg.svd(M, compute_uv=False)
        assert np.linalg.matrix_rank(found, tol=1e-4) == 4
        errors[f"attention/{name}"] = np.linalg.norm(S[4:]) / np.linalg.norm(S)
        assert np.linalg.norm(found - M) / np.linalg.norm(M) == pytest.approx(errors[f"attention/{name}"], rel=1e-4)
    assert names["errors"] == pytest.approx(errors, rel=1e-4)


class Normed(nnx.Module):
    """A model with dropout and running statistics, in a block that may be under `nnx.remat` or `nnx.jit`."""

    def __init__(self, transform, rngs: nnx.Rngs):
        self.query, self.head = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.dropout, self.norm, self.transform = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), transform

    def __call__(self, x):
        def block(model, x):
            return model.norm(model.dropout(model.query(x)))

        return self.head(self.transform(block)(self, x))


@pytest.mark.parametrize("transform", [lambda block: block, nnx.remat, nnx.jit], ids=["plain", "remat", "jit"])
def test_the_training_step_fits_models_with_state(transform, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, base = jax.random.normal(jax.random.key(0), (6, 8)), Normed(transform, nnx.Rngs(0))
    names = {"model": base, "batches": [(x, jnp.arange(6) % 3)] * 3}
    text = code("python")[0].replace(".*/(query|value)", "query")
    with jax.numpy_dtype_promotion("standard"):
        exec(text, names)
    assert names["step"]._cache_size() == 1
    trained = nnx.merge(*(names[name] for name in ("graphdef", "trainable", "frozen", "rest")))
    assert trained.dropout.rngs.count[...] == 3 and np.abs(trained.norm.mean[...]).max() > 1e-3
    np.testing.assert_array_equal(trained.query.kernel[...], base.query.kernel[...])
    assert not np.array_equal(trained.head.kernel[...], base.head.kernel[...])
    loaded, _ = surm_jax.load_adapter("my_adapter", base)
    mode = {"deterministic": True, "use_running_average": True}
    np.testing.assert_array_equal(nnx.view(loaded, **mode)(x), nnx.view(trained, **mode)(x))


def circulant(delta) -> np.ndarray:
    """Return the circulant update of a layer as a dense matrix, computed by SciPy from the parameters r1 and r2."""
    return scipy.linalg.circulant(np.asarray(delta["r1"][...] * delta["r2"][...], np.float64)).T


def with_kernels(model: Model, head, added: dict[str, np.ndarray]) -> Model:
    """Return a copy of the model with another head, and with matrices added to some kernels.

    Args:
        model: The model to copy.
        head: The parameters of the head in the copy.
        added: Dense matrices to add, by the name of the attention layer.
    """
    model = nnx.clone(model)
    model.head.kernel[...], model.head.bias[...] = head["kernel"][...], head["bias"][...]
    for name, M in added.items():
        kernel = getattr(model.attention, name).kernel
        kernel[...] = kernel[...] + jnp.asarray(M.reshape(kernel.shape), kernel.dtype)
    return model


def test_classes_of_others():
    class Einsum(nnx.Module):
        def __init__(self):
            self.einsum_str, self.w = "bd,dnh->bnh", nnx.Param(jnp.ones((4, 2, 3)))

        def __call__(self, x):
            return jnp.einsum(self.einsum_str, x, self.w)

    class Dense(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones((4, 6)))

        def __call__(self, x):
            return x @ self.weight.T

    class Experts(nnx.Module):
        def __init__(self):
            self.up, self.down = nnx.Param(jnp.ones((3, 4, 8))), nnx.Param(jnp.ones((3, 8, 4)))

        def __call__(self, x):
            return jnp.einsum("bf,efd->bd", jnp.tanh(jnp.einsum("bd,edf->bf", x, self.up)), self.down)

    class Model(nnx.Module):
        def __init__(self):
            self.q, self.out, self.experts = Einsum(), Dense(), Experts()

        def __call__(self, x):
            return self.experts(self.out(self.q(x).reshape(-1, 6)))

    x = jnp.ones((2, 4))
    names = {"surm_jax": surm_jax, "nnx": nnx, "model": Model(), "x": x}
    exec(code("python", GUIDE)[1], names | {"theirs": types.SimpleNamespace(Einsum=Einsum, Dense=Dense)})
    assert {Einsum, Dense} <= set(surm_jax.peft.kernels.KINDS)


def test_a_pretrained_model(tmp_path, monkeypatch):
    config = ViTConfig.from_variant("digits", num_classes=5, pool="token", activation="gelu", epsilon=1e-12)
    save_huggingface(tmp_path / "vit", ViT(config, rngs=nnx.Rngs(0)))
    monkeypatch.setattr("surm_jax.pretrained.hub.fetch", lambda source: tmp_path / "vit")
    names = {}
    exec(code("python", GUIDE)[2], names)
    assert isinstance(names["vit"], ViT) and names["vit"].head.kernel.shape == (64, 10)


@pytest.mark.exhaustive
def test_a_finished_run(tmp_path, monkeypatch):
    # Make a folder like that of a finished run of `python launch.py`, with random instead of trained parameters.
    job = prepare(parse(get_config()), 0)
    trained, adapter = job.adapt(job.base_model())
    graphdef, numbers, rest = nnx.split(trained, adapter.trainable, ...)
    rng = np.random.default_rng(0)
    numbers = jax.tree.map(lambda a: jnp.asarray(rng.normal(scale=0.1, size=a.shape), a.dtype), numbers)
    trained = nnx.merge(graphdef, numbers, rest)
    surm_jax.save_adapter(tmp_path / "runs" / "digits" / "adapter", trained, adapter)
    monkeypatch.chdir(tmp_path)
    names = {"image": job.task.dataset.test[3]["image"]}
    exec(code("python", GUIDE)[3], names)
    images = next(iter(job.task.eval_batches("test")))["image"]
    np.testing.assert_allclose(names["logits"], trained(images[3:4]), rtol=1e-4, atol=1e-5)
    assert np.ptp(names["logits"]) > 0.1


@pytest.mark.exhaustive
def test_the_matrices_on_their_own(capsys):
    rng = np.random.default_rng(0)
    W, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((40, 40), (3, 40)))
    names = {"W": W, "x": x}
    exec(code("python", GUIDE)[4], names)
    W, M = np.asarray(W, np.float64), np.asarray(names["C"].to_dense(), np.float64)
    U, S, Vt = np.linalg.svd(W)
    np.testing.assert_allclose(names["y"], x @ (W + 0.1 * M + (U[:, :2] * S[:2]) @ Vt[:2]), rtol=1e-4, atol=1e-4)
    # A low-rank matrix has 80 parameters per rank, so the budget allows rank 19.
    energies = ast.literal_eval(capsys.readouterr().out)
    assert energies["LowRank"] == pytest.approx(np.sum(S[:19] ** 2) / np.sum(S**2), rel=1e-5)
    assert energies["Circulant"] == pytest.approx(np.sum(M**2) / np.sum(W**2), rel=1e-5)
    assert 0.5 < energies["Kronecker"] < 1


def test_the_commands_are_those_of_ci():
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ("pip install -r requirements.txt", "python launch.py", "python -m pytest"):
        assert any(command in block for block in code("sh")) and command in ci


@pytest.mark.parametrize("key", sorted(set(re.findall(r"--config\.([\w.]+\w)", PAGES))))
def test_every_key_of_its_commands_is_one_of_the_configuration(key):
    # In the commands on the pages, METHOD stands for the name of any method.
    assert key.replace("METHOD", "lora") in keys(base_config())


@pytest.mark.parametrize(("flag", "known"), [("mode", launch.MODES), ("format", launch.FORMATS)])
def test_every_mode_and_format_of_its_commands_is_known(flag, known):
    named = set(re.findall(rf"--{flag}=(\w+)", PAGES))
    assert named and named <= set(known)


def test_every_other_flag_of_its_commands_is_one_of_the_command_line():
    lines = [
        line for block in code("sh", PAGES) for line in block.replace("\\\n", " ").splitlines() if "launch.py " in line
    ]
    flags = {flag for line in lines for flag in re.findall(r" --(\w+)=", line)}
    assert {"config", "mode", "workdir"} <= flags <= set(launch.FLAGS)


EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_every_extra_is_named():
    assert {*re.findall(r"\.\[(\w+)\]", PAGES)} == EXTRAS.keys()


LINK = r"\]\((?!http)([^)\s#]+)"


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/results/*.md")]), ids=str
)
def test_what_a_page_points_at_is_there(page):
    missing = [name for name in re.findall(LINK, page.read_text()) if not (page.parent / name).exists()]
    assert not missing
