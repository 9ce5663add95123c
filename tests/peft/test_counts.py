"""Check the number of parameters that every method trains on ViT-B/16 and BERT-base.

The expected numbers of structured methods are those of arXiv 2406.17740: 55,296 on Q, K and V, and 36,864 on Q and V.
The others come from the formulas in this file. The models are abstract, so that no weights are allocated.
"""

import functools

import jax
import pytest
from flax import nnx

from surm_jax.models import Bert, BertConfig, Decoder, DecoderConfig, ViT, ViTConfig
from surm_jax.peft import METHODS, Rule, Selection, adapt, describe, make_method
from tests.speeds import fast

D, HIDDEN, LAYERS = 768, 3072, 12
DENSE = D * D + D
BLOCK = 4 * DENSE + (D * HIDDEN + HIDDEN) + (HIDDEN * D + D)
BLOCK_BIASES = 4 * D + HIDDEN + D + 2 * D  # The biases of attention, of the MLP and of two norms.


@functools.cache
def abstract(name: str) -> nnx.Module:
    if name == "vit":
        config = ViTConfig.from_variant("B/16", num_classes=100)
        return nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    if name == "llama":
        llama = DecoderConfig.from_variant("llama-2-7b")
        return nnx.eval_shape(lambda: Decoder(llama, rngs=nnx.Rngs(0)))
    config = BertConfig.from_variant("base", num_classes=2)
    return nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))


def trained(model: str, name: str, target: str = "", **settings) -> int:
    method = make_method(name, settings)
    if isinstance(method, Selection):
        adapted, adapter = adapt(abstract(model), [], train=method.patterns, rngs=nnx.Rngs(0))
    else:
        rules = [Rule(target or method.target, method)]
        adapted, adapter = adapt(abstract(model), rules, rngs=nnx.Rngs(0))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(adapted)))
    return describe(adapted, adapter).trainable


UPDATES = {
    ("circulant", ()): 2 * D,
    ("toeplitz", ()): 2 * D,
    ("toeplitz_asymmetric", ()): 4 * D - 2,
    ("kronecker", ()): 2 * D,
    ("low_displacement", ()): 2 * D,
    ("low_displacement", (("rank", 2),)): 4 * D,
    ("low_displacement", (("rank", 4),)): 8 * D,
    ("lora", ()): 2 * D,
    ("lora", (("rank", 4),)): 8 * D,
    ("lora", (("rank", 16),)): 32 * D,
    ("lora", (("learn_alpha", True),)): 2 * D + 1,
    ("rslora", ()): 16 * D,
    ("lora_fix", ()): D,
    ("dora", ()): 3 * D,
    ("c3a", ()): D,
    ("c3a", (("block", 384),)): 2 * D,
    ("c3a", (("block", 128),)): 6 * D,
    ("lokr", ()): 24 * 24 + 32 * 8 + 8 * 32,
    ("lokr", (("rank", 16),)): 24 * 24 + 32 * 32,
    ("kadaptation", ()): 4**3 + 4 * (D // 4 + D // 4),
    ("structured", (("family", "SkewCirculant + LowRank"), ("rank", 3))): D + 6 * D,
    ("structured", (("family", "Toeplitz @ FCirculant"),)): 2 * D - 1 + D,
    ("mora", ()): 111**2,  # 111 is the nearest integer to sqrt(2 * 768 * 8).
    ("mora", (("rank", 1), ("compress", "rotate"))): 38**2,
    ("mora", (("rounding", "down"),)): 110**2,
}


# The numbers for one kernel of d x d features. The models have kernels of width 768, and of 4096 in Llama 2 7B.
BY_WIDTH = {
    ("more", ()): lambda d: 4 * 2 * d,
    ("gralora", ()): lambda d: 8 * 2 * d,
    ("cdvft", ()): lambda d: 3 * d,
    ("kradapter", ()): lambda d: d * (27 + 29) if d == 768 else d * (64 + 64),
    ("hira", ()): lambda d: 8 * 2 * d,
    ("modulated", (("family", "Toeplitz"),)): lambda d: 2 * d - 1,
    ("smoa", ()): lambda d: 8 * d,
    ("sine_lora", ()): lambda d: 8 * 2 * d,
    ("lr_lora", ()): lambda d: 8 * 2 * d + 16,
    ("abba", ()): lambda d: (4 + 4) * 2 * d,
}


@pytest.mark.parametrize(("model", "width", "layers"), [("vit", D, LAYERS), ("bert", D, LAYERS), ("llama", 4096, 32)])
@pytest.mark.parametrize("case", fast(BY_WIDTH, ("more", ())), ids=str)
def test_updates_of_square_kernels_of_three_models(case, model, width, layers):
    name, settings = case
    assert trained(model, name, "qv", **dict(settings)) == 2 * layers * BY_WIDTH[case](width)


@pytest.mark.parametrize("model", fast(["vit", "bert"]))
@pytest.mark.parametrize(
    "case",
    fast(UPDATES, ("circulant", ())),
    ids=str,
)
def test_updates_of_square_kernels(model, case):
    name, settings = case
    assert trained(model, name, "qkv", **dict(settings)) == 3 * LAYERS * UPDATES[case]
    assert trained(model, name, "qv", **dict(settings)) == 2 * LAYERS * UPDATES[case]


@pytest.mark.parametrize("model", fast(["vit", "bert"]))
@pytest.mark.parametrize(
    "name",
    fast(["circulant", "toeplitz", "kronecker", "lora", "low_displacement"]),
)
def test_the_papers_numbers(model, name):
    assert trained(model, name, "qkv") == 55_296
    assert trained(model, name, "qv") == 36_864


def test_the_stored_circulants_are_half_as_many():
    assert trained("vit", "c3a") == 27_648


@pytest.mark.parametrize("model", fast(["vit", "bert"]))
@pytest.mark.parametrize(
    "name",
    fast(f"{name}_adapter" for name in ("circulant", "toeplitz", "kronecker", "low_displacement", "structured")),
)
def test_structured_adapters(model, name):
    assert trained(model, name) == 55_296
    assert trained(model, name, bias=False) == 36_864
    assert trained(model, name, "pfeiffer") == 55_296 // 2


@pytest.mark.parametrize("model", fast(["vit", "bert"]))
def test_bottleneck_adapters(model):
    assert trained(model, "bottleneck", "houlsby") == 2_379_264
    assert trained(model, "bottleneck", "pfeiffer") == 1_189_632
    one = 2 * D * 64 + 64 + D
    assert trained(model, "adapter_drop") == 2 * (LAYERS - 5) * one
    waist = D // 16
    phm = 2 * (4**3 + 4 * (D // 4 + waist // 4)) + waist + D
    assert trained(model, "compacter") == 2 * LAYERS * phm


def test_selections():
    # ViT-B/16 has patches, a class token, 197 positions, 12 blocks with two norms each, and a norm. Its head has 100
    # classes.
    body = (16 * 16 * 3 * D + D) + D + 197 * D + LAYERS * (BLOCK + 4 * D) + 2 * D
    assert body == 85_798_656
    assert trained("vit", "full") == body + 100 * D + 100
    assert trained("vit", "attention_only") == LAYERS * 4 * DENSE == 28_348_416
    assert trained("vit", "norm_tuning") == (2 * LAYERS + 1) * 2 * D == 38_400
    assert trained("vit", "bitfit") == LAYERS * BLOCK_BIASES + D + D + 100  # The last terms are patches, norm and head.
    assert trained("vit", "linear_probe") == 0  # The head is trained with every method.

    embeddings = (30_522 + 512 + 2) * D + 2 * D
    body = embeddings + LAYERS * (BLOCK + 4 * D) + DENSE
    assert body == 109_482_240
    assert trained("bert", "full") == body + 2 * D + 2
    # Zaken et al. (arXiv 2106.10199) report 0.1 million trained parameters.
    assert trained("bert", "bitfit") == LAYERS * BLOCK_BIASES + D + D + 2 == 102_914
    assert trained("bert", "norm_tuning") == (2 * LAYERS + 1) * 2 * D
    assert trained("bert", "attention_only") == LAYERS * 4 * DENSE


class TestLlama2:
    WIDTH, HIDDEN, LAYERS = 4096, 11_008, 32

    def test_the_published_number_of_parameters(self):
        assert trained("llama", "full") == 6_738_415_616
        assert trained("llama", "norm_tuning") == (2 * self.LAYERS + 1) * self.WIDTH
        assert trained("llama", "attention_only") == self.LAYERS * 4 * self.WIDTH**2

    @pytest.mark.parametrize(
        ("name", "settings", "update"),
        fast(
            [
                ("low_displacement", {"rank": 4}, 8 * 4096),
                ("low_displacement", {"rank": 1}, 2 * 4096),
                ("lora", {"rank": 256}, 512 * 4096),
                ("mora", {"rank": 256}, 1448**2),
                ("circulant", {}, 2 * 4096),
            ],
            unpack=True,
        ),
    )
    def test_updates_of_the_attention(self, name, settings, update):
        assert trained("llama", name, "attention", **settings) == 4 * self.LAYERS * update
        assert trained("llama", name, "qv", **settings) == 2 * self.LAYERS * update

    def test_updates_of_rectangular_kernels(self):
        assert trained("llama", "lora", "mlp", rank=2) == 3 * self.LAYERS * 2 * (self.WIDTH + self.HIDDEN)
        every = trained("llama", "lora", "attention", rank=2) + trained("llama", "lora", "mlp", rank=2)
        assert trained("llama", "lora", "all-linear", rank=2) == every


def test_every_method_has_a_golden_number():
    covered = {name for name, _ in [*UPDATES, *BY_WIDTH]}
    covered |= {"circulant_adapter", "toeplitz_adapter", "kronecker_adapter", "low_displacement_adapter"}
    covered |= {"structured_adapter", "bottleneck", "adapter_drop", "compacter"}
    covered |= {"full", "attention_only", "norm_tuning", "bitfit", "linear_probe"}
    assert covered == METHODS.keys()
