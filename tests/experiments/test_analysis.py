"""Compare single measurements of `experiments.analysis` with numpy, and run its commands on a tiny model."""

import csv
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx
from safetensors.numpy import load_file

import surm_jax
from experiments import analysis, energy
from experiments.cka import linear_cka
from experiments.runs import first_gradient
from experiments.updates import block_of, changes, examine, kernels, one_minus_cosine, rank_in_theory
from surm_jax.errors import UserError
from surm_jax.models import ViT, ViTConfig
from surm_jax.structured import (
    FAMILIES,
    BlockCirculant,
    Circulant,
    Kronecker,
    LowDisplacementRank,
    LowRank,
    SymmetricToeplitzPair,
    ToeplitzPair,
    approximations,
    near_square_factors,
)
from surm_jax.training.modes import train_run
from surm_jax.training.parsing import to_dict
from surm_jax.training.setup import prepare
from tests.speeds import fast
from tests.training import tiny, tiny_text

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def tiny_variant():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ViTConfig.VARIANTS, tiny.NAME, tiny.GEOMETRY)
        yield


@pytest.fixture
def no_search(monkeypatch):
    """Skip every search for a nearest matrix, and take its starting point instead, since searches compile slowly."""
    monkeypatch.setattr(energy, "approximations", functools.partial(approximations, steps=0))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny.write_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """Return a folder with finished runs of three methods, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("circulant", "full", "bottleneck"):
        make_run(tiny.make_config(files, method), folder / method)
    return folder


def make_run(config, folder):
    """Write the files of a finished run that the analysis reads, without training.

    Gaussian noise is added to the parameters that the run would train.
    """
    job = prepare(config, 0)
    model, adapter = job.adapt(job.base_model())
    rng = np.random.default_rng(0)
    graphdef, trained, frozen = nnx.split(model, adapter.trainable, ...)
    trained = jax.tree.map(lambda array: array + 0.05 * rng.normal(size=array.shape).astype(np.float32), trained)
    surm_jax.save_adapter(folder / "adapter", nnx.merge(graphdef, trained, frozen), adapter)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "result.json").write_text("{}")


def states_of(model, *arguments, **options):
    """Return the hidden states of a model, computed by one compiled program."""
    graphdef, state = nnx.split(model)
    return _states(graphdef, state, arguments, options)


@functools.partial(jax.jit, static_argnums=0)
def _states(graphdef, state, arguments, options):
    return nnx.merge(graphdef, state).hidden_states(*arguments, **options)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Tests of the share of energy that families keep.


def share_of_span(M, basis):
    """Return the share of M's squared norm that the nearest matrix in the span of a basis keeps, by least squares."""
    columns = np.stack([matrix.ravel() for matrix in basis], axis=1).astype(float)
    weights = np.linalg.lstsq(columns, M.ravel().astype(float), rcond=None)[0]
    return np.sum((columns @ weights) ** 2) / np.sum(M.astype(float) ** 2)


def circulants(m, n):
    N = max(m, n)
    # `Circulant` stores the first row of its matrix, and scipy takes the first column, so transpose. For square
    # matrices the span is the same without transposing.
    return [scipy.linalg.circulant(unit).T[:m, :n] for unit in np.eye(N)]


def toeplitz(m, n):
    return [np.eye(m, n, k) for k in range(1 - m, n)]


def symmetric_toeplitz(m, n):
    return [scipy.linalg.toeplitz(unit)[:m, :n] for unit in np.eye(max(m, n))]


def grids(m, n, b):
    return [
        np.kron(np.outer(p, q), scipy.linalg.circulant(unit))
        for p in np.eye(m // b) for q in np.eye(n // b) for unit in np.eye(b)
    ]  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("shape", fast([(10, 10), (14, 10)]))
def test_shares_are_those_of_projections(shape):
    m, n = shape
    M = draw(0, m, n) + 0.3 * np.arange(m)[:, None] + np.eye(m, n, 1)
    kept = {family.name: (share, family) for family, share in energy.shares(M).items()}
    assert all(family.parameters <= 2 * max(shape) for _, family in kept.values())
    bases = {
        "Circulant": circulants(m, n),
        "Toeplitz": toeplitz(m, n),
        "SymmetricToeplitz": symmetric_toeplitz(m, n),
    }
    # The largest block that divides both 14 and 10 is 2, and with blocks of 2 a matrix has too many parameters.
    assert ("BlockCirculant" in kept) == (m == n)
    if m == n:
        assert kept["BlockCirculant"][1].size == "block 5"
        bases["BlockCirculant"] = grids(m, n, 5)
    for name, basis in bases.items():
        share, family = kept[name]
        assert family.parameters == len(basis) and not family.searched
        np.testing.assert_allclose(share, share_of_span(M, basis), rtol=1e-4, err_msg=name)
    share, family = kept["LowRank"]
    rank = int(family.size.removeprefix("rank "))
    assert family.parameters == rank * (m + n)
    values = np.linalg.svd(M.astype(float), compute_uv=False) ** 2
    np.testing.assert_allclose(share, values[:rank].sum() / values.sum(), rtol=1e-4)
    assert kept["LowDisplacementRank"][1].searched


@pytest.mark.usefixtures("no_search")
def test_structure_is_found_where_it_is():
    one, other = near_square_factors((10, 10))
    for name, M in {
        "Circulant": scipy.linalg.circulant(draw(0, 10)),
        "Kronecker": np.kron(draw(1, *one), draw(2, *other)),
        "LowRank": np.outer(draw(3, 10), draw(4, 10)),
        "Toeplitz": scipy.linalg.toeplitz(draw(5, 10), draw(6, 10)),
    }.items():
        kept = {family.name: share for family, share in energy.shares(np.asarray(M, np.float64) * 1e-20).items()}
        assert kept[name] == pytest.approx(1, abs=1e-5), name


@pytest.mark.usefixtures("no_search")
@pytest.mark.exhaustive
def test_a_gaussian_matrix_keeps_parameters_by_entries(monkeypatch):
    monkeypatch.setattr(energy, "DRAWS", 40)
    side = 10
    one, other = energy.energy_maps({"a": draw(0, side, side), "b": draw(1, 14, 10), "c": draw(2, side, side)})
    assert (one.shape, list(one.shares), other.shape, list(other.shares)) == ((10, 10), ["a", "c"], (14, 10), ["b"])
    for found in (one, other):
        gaussian = {family.name: (share, family.parameters) for family, share in found.gaussian.items()}
        for name in ("Circulant", "Toeplitz", "SymmetricToeplitz", "SkewCirculant"):
            share, parameters = gaussian[name]
            assert share == pytest.approx(parameters / np.prod(found.shape), rel=0.2), name
    # Low rank, a family of products, keeps more, since the largest singular value of a Gaussian matrix is larger than
    # the average one.
    share, parameters = {family.name: (s, family.parameters) for family, s in one.gaussian.items()}["LowRank"]
    expected = np.mean([
        np.linalg.norm(M, 2) ** 2 / np.linalg.norm(M) ** 2
        for M in (np.random.default_rng(seed).normal(size=(side, side)) for seed in range(40))
    ])  # fmt: skip
    assert share == pytest.approx(expected, rel=1e-4) and share > 1.3 * parameters / side**2


@pytest.mark.usefixtures("no_search")
@pytest.mark.exhaustive
def test_all_families_that_can_be_so_small_are_compared():
    compared = {family.name for family in energy.shares(draw(0, 16, 16))}
    small = {name for name, family in FAMILIES.items() if family.options_within((16, 16), 2 * 16) is not None}
    assert compared == small - energy.LEFT_OUT


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_layer_without_energy_is_named(value):
    with pytest.raises(UserError, match=r"blocks/1/up: there is no energy to share"):
        energy.energy_maps({"blocks/1/up": np.full((4, 4), value, np.float32)})


# Tests of the measurements of a single layer's update.


def zeroed(c, *frequencies):
    spectrum = np.fft.fft(c)
    spectrum[list(frequencies)] = 0
    return np.fft.ifft(spectrum).real.astype(np.float32)


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (Circulant(jnp.asarray(zeroed(draw(0, 12), 0, 3, 9)), shape=(12, 12)), "= 9 (non-zero DFT)"),
        (BlockCirculant(jnp.asarray(np.stack([draw(1, 1, 6)] * 2))), "= 6 (DFT of the blocks)"),
        (Kronecker(A=jnp.asarray(np.outer(draw(2, 3), draw(3, 4)))[None], B=draw(4, 1, 4, 3)), "= 1 x 3 (factors)"),
        (Kronecker(A=draw(5, 2, 3, 4), B=draw(6, 2, 4, 3)), "<= 12 (sum of products)"),
        (LowRank(down=draw(8, 12, 2), up=draw(7, 9, 2).T), "<= 2 (columns)"),
        pytest.param(
            SymmetricToeplitzPair(t1=draw(9, 8), t2=jnp.ones(8), shape=(8, 8)),
            "<= 1 (factors)",
            marks=pytest.mark.exhaustive,
        ),
        (ToeplitzPair(t1=jnp.ones(15), t2=draw(10, 15), shape=(8, 8)), "<= 1 (factors)"),
        pytest.param(
            LowDisplacementRank(G=draw(11, 6, 1), H=draw(12, 6, 1), shape=(6, 4)), "<= 4", marks=pytest.mark.exhaustive
        ),
        (Circulant(draw(13, 8), shape=(8, 4)), "<= 4"),
    ],
)
def test_theory_says_what_the_rank_is(matrix, said):
    assert rank_in_theory(matrix) == said
    rank = np.linalg.matrix_rank(np.asarray(matrix.to_dense(), np.float64), rtol=1e-6)
    bound = np.prod([int(number) for number in said.split("(")[0].strip("<= ").split(" x ")])
    assert rank == bound if said.startswith("=") else rank <= bound


def test_an_update_is_measured():
    layer = nnx.Dict(up=nnx.Linear(6, 6, rngs=nnx.Rngs(0)), head=nnx.Linear(6, 2, rngs=nnx.Rngs(1)))
    adapted, _ = surm_jax.adapt(
        layer, [surm_jax.Rule("up", surm_jax.CirculantUpdate(alpha=0.5))], train=["head/.*"], rngs=nnx.Rngs(2)
    )
    assert list(kernels(adapted)) == ["up"] and examine("up", changes(layer, adapted)["up"]).rank == 0
    adapted.up.delta["default"].r1[...] = jnp.asarray(draw(0, 6))
    adapted.head.kernel[...] += 1
    found = changes(layer, adapted)
    assert list(found) == ["up"]
    c = np.asarray(adapted.up.delta["default"].r1[...] * adapted.up.delta["default"].r2[...], np.float64)
    factor = found["up"].added[0, 0] / c[0]
    D, W = factor * scipy.linalg.circulant(c).T, np.asarray(layer.up.kernel[...], np.float64)
    np.testing.assert_allclose(found["up"].added, D, rtol=1e-5)
    row = examine("up", found["up"])
    assert (row.layer, row.rows, row.columns, row.family, row.numbers) == ("up", 6, 6, "Circulant", 6)
    assert (row.rank, row.theory, row.displacement_rank) == (6, "= 6 (non-zero DFT)", 1)
    cosine = np.sum(W * (W + D)) / np.linalg.norm(W) / np.linalg.norm(W + D)
    values = np.linalg.svd(D, compute_uv=False)
    expected = values[0] / values[-1], np.sum(values**2) / values[0] ** 2, np.linalg.norm(D) / np.linalg.norm(W)
    np.testing.assert_allclose((row.condition, row.stable_rank, row.relative_norm), expected, rtol=1e-4)
    np.testing.assert_allclose(row.one_minus_cosine, 1 - cosine, rtol=1e-5)


def test_tiny_angles_are_measured():
    one = draw(0, 30, 30).astype(np.float64)
    across = draw(1, 30, 30) - np.sum(draw(1, 30, 30) * one) / np.sum(one**2) * one
    for angle in (1e-7, 1e-3):
        other = one / np.linalg.norm(one) * np.cos(angle) + across / np.linalg.norm(across) * np.sin(angle)
        # Computing this as 1 minus a cosine near 1 would lose most digits.
        np.testing.assert_allclose(one_minus_cosine(one, 5 * other), 2 * np.sin(angle / 2) ** 2, rtol=1e-6)


@pytest.mark.exhaustive
def test_what_is_no_plain_update_is_dense():
    base = nnx.Dict(up=nnx.Linear(6, 4, rngs=nnx.Rngs(0)), down=nnx.Linear(4, 6, rngs=nnx.Rngs(1)))
    dora, _ = surm_jax.adapt(base, [surm_jax.Rule("up", surm_jax.peft.DoRA(rank=2))], rngs=nnx.Rngs(2))
    delta = dora.up.delta["default"]
    delta.up[...], delta.magnitude[...] = jnp.asarray(draw(0, *delta.up.shape)), 2 * delta.magnitude[...]
    merged, _ = surm_jax.merge(dora)
    change = changes(base, dora)["up"]
    assert change.matrix is None and examine("up", change).theory == ""
    np.testing.assert_allclose(change.added, merged.up.kernel[...] - base.up.kernel[...], atol=1e-6)
    # Here both the kernel itself and an update of it are trained.
    both, _ = surm_jax.adapt(
        base, [surm_jax.Rule("up", surm_jax.LoRA(rank=1))], train=[".*/kernel"], rngs=nnx.Rngs(3)
    )  # fmt: skip
    both.up.delta["default"].up[...] = jnp.asarray(draw(1, *both.up.delta["default"].up.shape))
    both.up.kernel[...] += jnp.asarray(draw(2, 6, 4))
    merged, _ = surm_jax.merge(both)
    found = changes(base, both)
    assert list(found) == ["up"] and examine("up", found["up"]).rank == 4
    np.testing.assert_allclose(found["up"].added, merged.up.kernel[...] - base.up.kernel[...], atol=1e-6)


def test_layers_of_one_kind_stand_together_in_the_order_of_blocks():
    blocks = [
        nnx.Dict(up=nnx.Linear(2, 2, rngs=nnx.Rngs(0)), out=nnx.Linear(2, 2, rngs=nnx.Rngs(0))) for _ in range(11)
    ]
    model = nnx.Dict(blocks=nnx.List(blocks), pooler=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    outs, ups = ([f"blocks/{number}/{kind}" for number in range(11)] for kind in ("out", "up"))
    assert list(kernels(model)) == [*outs, "pooler", *ups]
    assert [block_of(path) for path in ("blocks/10/up", "pooler")] == [10, None]


# Tests of the first gradient of training.


def by_hand(model, batches, outputs_of):
    """Return the gradient of the mean cross-entropy for all parameters of a model without an adapter.

    Args:
        model: The model.
        batches: The batches to average over.
        outputs_of: Returns the logits, given the model and a batch.
    """

    def loss(model):
        outputs = [outputs_of(model, batch) for batch in batches]
        scores = jnp.stack([
            jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)
            for logits, batch in zip(outputs, batches, strict=True)
        ])  # fmt: skip
        return -scores.mean()

    return nnx.jit(nnx.grad(loss))(model)


@pytest.mark.exhaustive
def test_gradient_of_a_head_that_starts_at_zero_is_that_of_its_second_step(files):
    job = prepare(tiny.make_config(files, "linear_probe", **{"mesh.data": 1}), 0)
    found = first_gradient(job, 2)
    stream = job.task.train_batches(0)
    batches = [next(stream) for _ in range(2)]
    model = job.base_model()
    assert not np.any(model.head.kernel[...])
    # While all logits are zero, the gradient for the head's kernel has a simple formula.
    labels = np.concatenate([batch["label"] for batch in batches])
    inputs = np.concatenate([
        np.asarray(model.norm(states_of(model, batch["image"])[-1]))[:, 0] for batch in batches
    ]).astype(np.float64)  # fmt: skip
    step = inputs.T @ (np.eye(3)[labels] - 1 / 3)
    model.head.kernel[...] = jnp.asarray(1e-3 * step / np.linalg.norm(step), jnp.float32)
    expected = kernels_of(by_hand(model, batches, lambda model, batch: model(batch["image"])), found)
    for path, gradient in found.items():
        scale = np.abs(expected[path]).max()
        assert scale > 1e-7
        np.testing.assert_allclose(gradient, expected[path], atol=2e-3 * scale, err_msg=path)


def kernels_of(gradients, like):
    flat = {"/".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(gradients)}
    return {path: np.asarray(flat[f"{path}/kernel"]).reshape(matrix.shape) for path, matrix in like.items()}


@pytest.mark.exhaustive
def test_gradient_of_a_text_model_is_by_its_own_head(tmp_path):
    job = prepare(tiny_text.make_config(tiny_text.write_files(tmp_path), **{"data.lengths": (20,)}), 0)
    found = first_gradient(job, 2)
    assert "pooler" in found and not any(path.startswith("head") for path in found)
    stream = job.task.train_batches(0)
    batches = [next(stream) for _ in range(2)]
    model = job.base_model()
    assert np.any(model.head.kernel[...])
    expected = kernels_of(
        by_hand(
            model,
            batches,
            lambda m, batch: m(batch["tokens"], mask=batch["token_mask"], token_types=batch["token_types"]),
        ),
        found,
    )
    for path, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[path], atol=1e-4 * np.abs(expected[path]).max(), err_msg=path)


# Tests of the commands from end to end.


@pytest.mark.exhaustive
def test_a_run_beside_full_fine_tuning(runs, files, tmp_path, capsys):
    out = tmp_path / "new" / "0.01-0"
    arguments = [str(runs / "circulant"), f"--full={runs / 'full'}", f"--out={out}", "--examples=20"]
    analysis.main(arguments)
    rows = {row["layer"]: row for row in read(tmp_path / "new" / "0.01-0.csv")}
    assert sorted(rows) == [f"blocks/0/attention/{name}" for name in ("key", "query", "value")]
    weights, adapter = load_file(files / "weights.safetensors"), load_file(runs / "circulant" / "adapter" / ADAPTER)
    for layer, row in rows.items():
        # The file of the adapter stores the product of the two trained vectors, and its matrix has the scale 1.
        D = scipy.linalg.circulant(adapter[f"{layer}/delta/c"].astype(np.float64)).T
        W = weights[f"{layer}/kernel"].reshape(10, 10).astype(np.float64)
        assert float(row["relative_norm"]) == pytest.approx(np.linalg.norm(D) / np.linalg.norm(W), rel=1e-4)
        cosine = np.sum(W * (W + D)) / np.linalg.norm(W) / np.linalg.norm(W + D)
        assert float(row["one_minus_cosine"]) == pytest.approx(1 - cosine, rel=1e-4)
        assert int(row["rank"]) == np.linalg.matrix_rank(D, rtol=1e-6)
    _check_cka(read(tmp_path / "new" / "0.01-0.cka.csv"), runs, files)
    assert "| blocks/0/attention/key | 10 x 10 | Circulant | 10 | 10 |" in capsys.readouterr().out
    assert (tmp_path / "new" / "0.01-0.png").stat().st_size > 10_000


@pytest.mark.exhaustive
def test_a_trained_run(files, tmp_path):
    rate = {"optim.learning_rate.circulant": 0.05, "optim.steps": 3}
    train_run(tiny.make_config(files, "circulant", **rate), tmp_path / "run")
    analysis.main([str(tmp_path / "run"), f"--out={tmp_path / 'x'}"])
    assert {(row["family"], row["rank"]) for row in read(tmp_path / "x.csv")} == {("Circulant", "10")}


def _check_cka(rows, runs, files):
    job = prepare(tiny.make_config(files, **{"mesh.data": 1}), 0)
    base = job.base_model()
    tuned, full = (surm_jax.load_adapter(runs / name / "adapter", base)[0] for name in ("circulant", "full"))
    images = np.load(files / "data.npz")["test_images"].astype(np.float32) / 127.5 - 1
    states = {
        name: [np.asarray(state).reshape(-1, 10) for state in states_of(model, images)]
        for name, model in (("run", tuned), ("base", base), ("full", full))
    }
    assert [int(row["blocks"]) for row in rows] == [0, 1]
    for place, row in enumerate(rows):
        for name in ("run", "base"):
            expected = linear_cka(states[name][place], states["full"][place])
            assert float(row[name]) == pytest.approx(expected, abs=1e-4)
    assert float(rows[1]["run"]) < 0.999


@pytest.mark.exhaustive
def test_a_full_run_is_like_itself(runs, files, tmp_path):
    analysis.main([str(runs / "full"), f"--full={runs / 'full'}", f"--out={tmp_path / 'x'}"])
    assert [float(row["run"]) for row in read(tmp_path / "x.cka.csv")] == [1, 1]
    weights, adapter = load_file(files / "weights.safetensors"), load_file(runs / "full" / "adapter" / ADAPTER)
    rows = read(tmp_path / "x.csv")
    assert len(rows) == 6 and {(row["family"], row["theory"], row["displacement_rank"]) for row in rows} == {
        ("dense", "", "")
    }
    for row in rows:
        one, other = (tensors[f"{row['layer']}/kernel"].ravel().astype(np.float64) for tensors in (weights, adapter))
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert float(row["one_minus_cosine"]) == pytest.approx(1 - cosine, rel=1e-4)


def test_a_bottleneck_has_no_update_but_hidden_states(runs, tmp_path, capsys):
    analysis.main([str(runs / "bottleneck"), f"--out={tmp_path / 'alone'}"])
    text = capsys.readouterr().out
    assert "There is no weight update: bottleneck leaves the kernels of linear layers as they are." in text
    assert not [*tmp_path.iterdir()]
    analysis.main([str(runs / "bottleneck"), f"--full={runs / 'full'}", f"--out={tmp_path / 'beside'}"])
    assert len(read(tmp_path / "beside.cka.csv")) == 2
    assert {path.name for path in tmp_path.glob("beside*")} == {"beside.cka.csv", "beside.png"}


@pytest.mark.exhaustive
def test_a_text_run(tmp_path):
    files = tiny_text.write_files(tmp_path)
    for method in ("lora", "full"):
        make_run(tiny_text.make_config(files, "stsb", method), tmp_path / method)
    arguments = [str(tmp_path / "lora"), f"--full={tmp_path / 'full'}", f"--out={tmp_path / 'x'}", "--examples=100"]
    analysis.main(arguments)
    assert {(row["family"], row["rank"], row["theory"]) for row in read(tmp_path / "x.csv")} == {
        ("LowRank", "1", "<= 1 (columns)")
    }
    rows = read(tmp_path / "x.cka.csv")
    # Padding must not affect the result, so compare it with hidden states of one example at a time without padding.
    job = prepare(tiny_text.make_config(files, "stsb"), 0)
    base = job.base_model()
    full, _ = surm_jax.load_adapter(tmp_path / "full" / "adapter", base)
    source = job.task.evaluated[job.task.tests[0]]
    states = {"base": [], "full": []}
    for start, stop in zip(source.offsets[:-1], source.offsets[1:], strict=True):
        place = slice(start, stop)
        for name, model in (("base", base), ("full", full)):
            tokens, types = source.tokens[None, place], source.token_types[None, place]
            states[name].append([np.asarray(state)[0] for state in states_of(model, tokens, token_types=types)])
    for layer, row in enumerate(rows):
        one, other = (np.concatenate([parts[layer] for parts in states[name]]) for name in ("base", "full"))
        assert float(row["base"]) == pytest.approx(linear_cka(one, other), abs=1e-4)


@pytest.mark.usefixtures("no_search")
@pytest.mark.exhaustive
@pytest.mark.parametrize("source", ["full", "gradient"])
def test_an_energy_map(runs, files, tmp_path, source):
    analysis.main([str(runs / "full"), f"--energy={source}", f"--out={tmp_path / 'x'}", "--batches=2"])
    rows = read(tmp_path / f"x_energy_{source}.csv")
    shapes = {(row["in"], row["out"]) for row in rows}
    assert shapes == {("10", "10"), ("10", "14"), ("14", "10")} and len({row["layer"] for row in rows}) == 6
    if source == "full":
        weights, adapter = load_file(files / "weights.safetensors"), load_file(runs / "full" / "adapter" / ADAPTER)
        for row in rows:
            if row["family"] == "LowRank":
                name, shape = f"{row['layer']}/kernel", (int(row["in"]), int(row["out"]))
                values = np.linalg.svd((adapter[name] - weights[name]).reshape(shape), compute_uv=False) ** 2
                assert row["size"] == "rank 1" and row["found"] == "exact"
                assert float(row["share"]) == pytest.approx(values[0] / values.sum(), abs=1e-4)
    tables = analysis.tables(tmp_path / f"x_energy_{source}")
    assert {*tables} == {"10 x 10", "10 x 14", "14 x 10"}
    assert "| low rank, rank 1 | 20 | formula |" in tables["10 x 10"]
    assert (tmp_path / f"x_energy_{source}.png").stat().st_size > 10_000


@pytest.mark.usefixtures("no_search")
@pytest.mark.exhaustive
def test_the_gradient_needs_no_run(files, tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "RESULTS", tmp_path)
    analysis.main([f"{Path(tiny.__file__).parent / 'tiny_job.py'}:{files}", "--energy=gradient", "--batches=1"])
    (path,) = tmp_path.glob("analysis_tiny_job_*_energy_gradient.csv")
    of_file = read(path)
    folder = tmp_path / "begun"
    folder.mkdir()
    config = to_dict(tiny.make_config(files))
    (folder / "config.json").write_text(json.dumps(config))
    analysis.main([str(folder), "--energy=gradient", "--batches=1"])
    assert read(tmp_path / "analysis_begun_energy_gradient.csv") == of_file


# Tests of what cannot be analysed.


def copied(run, folder, **changed):
    """Copy the folder of a finished run, and replace top-level entries of the configuration in the copy."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    return folder


def test_what_is_no_finished_run_is_refused(runs, tmp_path):
    for arguments in ([str(tmp_path)], [str(tmp_path), "--energy=gradient"], [str(tmp_path), "--energy=full"]):
        with pytest.raises(UserError, match=f"no run in {tmp_path}: there is no"):
            analysis.main([*arguments, f"--out={tmp_path / 'x'}"])
    begun = copied(runs / "circulant", tmp_path / "begun")
    (begun / "result.json").unlink()
    with pytest.raises(UserError, match=r"the run in .*begun is not complete"):
        analysis.main([str(begun), f"--out={tmp_path / 'x'}"])
    with pytest.raises(UserError, match=r"begun is not complete"):
        analysis.main([str(runs / "circulant"), f"--full={begun}", f"--out={tmp_path / 'x'}"])
    several = copied(runs / "circulant", tmp_path / "several", seeds=[4, 5])
    with pytest.raises(UserError, match=r"a run for each of 2 seeds: choose one, such as .*several/seed-4"):
        analysis.main([str(several), f"--out={tmp_path / 'x'}"])
    with pytest.raises(UserError, match=r"there is no configuration 'configs/digit\.py'"):
        analysis.main(["configs/digit.py", "--energy=gradient", f"--out={tmp_path / 'x'}"])
    for option in ("batches", "examples"):
        with pytest.raises(UserError, match=f"--{option} must be at least 1, got 0"):
            analysis.main([str(runs / "circulant"), f"--{option}=0", f"--out={tmp_path / 'x'}"])


@pytest.mark.exhaustive
def test_only_full_fine_tuning_of_the_same_model_and_data_is_compared_with(runs, tmp_path):
    circulant, out = str(runs / "circulant"), f"--out={tmp_path / 'x'}"
    for arguments in ([circulant, f"--full={circulant}"], [circulant, "--energy=full"]):
        with pytest.raises(UserError, match="holds a run of circulant, but a fully tuned network is needed"):
            analysis.main([*arguments, out])
    data = json.loads((runs / "full" / "config.json").read_text())["data"]
    other = copied(runs / "full", tmp_path / "other", data={**data, "name": "digits_5to9"})
    with pytest.raises(UserError, match=r"other was trained on digits_5to9, but .*circulant on .*data\.npz"):
        analysis.main([circulant, f"--full={other}", out])
    few = copied(runs / "full", tmp_path / "few", data={**data, "classes": ["0", "2"]})
    with pytest.raises(UserError, match=r"few was trained on the classes 0, 2 of .*npz, but .*circulant on .*npz"):
        analysis.main([circulant, f"--full={few}", out])
    wide = copied(runs / "full", tmp_path / "wide")
    shutil.rmtree(wide / "adapter")
    vit = ViT(ViTConfig(**{**tiny.GEOMETRY, "width": 12}, num_classes=3), rngs=nnx.Rngs(0))
    surm_jax.save_adapter(wide / "adapter", *surm_jax.adapt(vit, [], train=[".*"], rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"wide and .*circulant are not of the same model: .*shape"):
        analysis.main([circulant, f"--full={wide}", out])
