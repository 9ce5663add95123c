"""Small models of other libraries, with random weights and an input, for tests and for the table in docs/models.md."""

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

TOKENS = jnp.arange(12).reshape(2, 6) % 11 + 1
PIXELS = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))


class Called(nnx.Module):
    """A model, called with one argument as a function of the model and this argument says."""

    def __init__(self, model: nnx.Module, call: Callable[[Any, Any], jax.Array]) -> None:
        self.model, self.call = model, call

    def __call__(self, inputs: Any) -> jax.Array:
        return self.call(self.model, inputs)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A model of another library.

    Attributes:
        library: The module of the library.
        make: A function that returns the model and an input.
    """

    library: str
    make: Callable[[], tuple[Called, Any]]

    def there(self) -> bool:
        return importlib.util.find_spec(self.library) is not None


MODELS: dict[str, Peer] = {}


def peer(name: str, library: str) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        MODELS[name] = Peer(library, make)
        return make

    return register


PACKAGES = {"tunix": "google-tunix", "canvit_nnx": "canvit-nnx", "maxtext": "maxtext"}


def versions(library: str) -> str:
    """Return the name and version of a library, or the commit of one that has no releases."""
    if library == "bonsai":
        return "bonsai 3628425"
    return f"{PACKAGES[library]} {importlib.metadata.version(PACKAGES[library])}"


def decoder(model: nnx.Module) -> tuple[Called, Any]:
    """Return a decoder of tunix, called with tokens."""
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (2, 6, 6))
    return Called(model, lambda model, tokens: model(tokens, positions, None, mask)[0]), TOKENS


TUNIX: dict[str, Any] = {
    "num_layers": 2,
    "embed_dim": 32,
    "hidden_dim": 48,
    "num_heads": 4,
    "head_dim": 8,
    "num_kv_heads": 2,
}


@peer("tunix llama3", "tunix")
def _() -> tuple[Called, Any]:
    from tunix.models.llama3 import model

    config = model.ModelConfig(**TUNIX, vocab_size=64, rope_theta=10_000, norm_eps=1e-5)
    return decoder(model.Llama3(config, rngs=nnx.Rngs(0)))


@peer("tunix qwen3, mixture of experts", "tunix")
def _() -> tuple[Called, Any]:
    from tunix.models.qwen3 import model

    config = model.ModelConfig(
        **TUNIX, vocab_size=64, rope_theta=10_000, norm_eps=1e-6, num_experts=4, num_experts_per_tok=2
    )
    return decoder(model.Qwen3(config, rngs=nnx.Rngs(0)))


@peer("tunix gemma3", "tunix")
def _() -> tuple[Called, Any]:
    from tunix.models.gemma3 import model

    config = model.ModelConfig(**TUNIX, num_embed=64, sliding_window_size=4, param_dtype=jnp.float32)
    return decoder(model.Gemma3(config, rngs=nnx.Rngs(0)))


@peer("canvit", "canvit_nnx")
def _() -> tuple[Called, Any]:
    import canvit_core.backbone as backbone
    from canvit_nnx import CanViTConfig, CanViTForImageClassification, Viewpoint

    backbone.BACKBONES["vits16"] = backbone.ViTSpec(embed_dim=32, num_heads=4, num_blocks=4)
    config = CanViTConfig("vits16", canvas_num_heads=2, canvas_head_dim=16, num_canvas_registers=2)
    model = CanViTForImageClassification(canvit_config=config, n_classes=5, rngs=nnx.Rngs(0))

    def call(model: Any, pixels: jax.Array) -> jax.Array:
        state = model.init_state(batch_size=1, canvas_grid_size=4)
        view = Viewpoint.full_scene(batch_size=1)
        for _ in range(2):
            logits, state = model(glimpse=pixels, state=state, viewpoint=view)
        return logits

    return Called(model, call), PIXELS


@peer("bonsai vit", "bonsai")
def _() -> tuple[Called, Any]:
    from bonsai.models.vit import modeling

    config = modeling.ModelConfig((32, 32), (8, 8), 3, 32, 0.0, 0.0, 4, 48, 1e-6, 2, 5)
    return Called(modeling.ViTClassificationModel(config, rngs=nnx.Rngs(0)), lambda m, x: m(x, rngs=None)), PIXELS


@peer("bonsai dinov3", "bonsai")
def _() -> tuple[Called, Any]:
    from bonsai.models.dinov3 import modeling

    config = modeling.ModelConfig(
        patch_size=(8, 8),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
    )
    model = modeling.Dinov3ViTModel(config, nnx.Rngs(0))
    return Called(model, lambda m, x: m(x)["last_hidden_state"]), jnp.moveaxis(PIXELS, -1, 1)


@peer("bonsai qwen3", "bonsai")
def _() -> tuple[Called, Any]:
    from bonsai.models.qwen3 import modeling

    config = modeling.ModelConfig(2, 64, 32, 48, 4, 8, 2, 10_000, 1, 10_000.0, 1e-6, False)

    def call(model: Any, tokens: jax.Array) -> jax.Array:
        cache = modeling.init_cache(config, 2, 6, 2, jnp.float32)
        return model(tokens, cache=cache, segment_ids=jnp.ones_like(tokens))

    return Called(modeling.Qwen3(config, rngs=nnx.Rngs(0)), call), TOKENS


@peer("bonsai llada", "bonsai")
def _() -> tuple[Called, Any]:
    from bonsai.models.llada import modeling

    config = modeling.ModelConfig(
        jnp.float32, 32, 4, 4, 2, 0.0, 32, 10_000.0, False, False, 64, 64, 48,
        modeling.ShardingConfig.no_sharding(), False,
    )  # fmt: skip
    jax.set_mesh(jax.make_mesh((1,), ("fsdp",)))  # The model names shardings, if only empty ones.
    model = modeling.LLaDAModel(config, rngs=nnx.Rngs(0))
    return Called(model, lambda m, x: m(x, jnp.ones_like(x), jax.random.key(0))[0]), TOKENS


@peer("bonsai umt5", "bonsai")
def _() -> tuple[Called, Any]:
    from bonsai.models.umt5 import modeling

    config = modeling.ModelConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    model = modeling.UMT5Model(config, rngs=nnx.Rngs(0))
    mask = jnp.ones((2, 6), int)

    def call(model: Any, x: jax.Array) -> jax.Array:
        return model.lm_head(model(input_ids=x, attention_mask=mask, decoder_input_ids=x, decoder_attention_mask=mask))

    return Called(model, call), TOKENS


@peer("bonsai whisper", "bonsai")
def _() -> tuple[Called, Any]:
    from bonsai.models.whisper import modeling

    small = {
        "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 64, "max_source_positions": 4,
        "num_mel_bins": 8, "max_length": 8,
    }  # fmt: skip
    config = dataclasses.replace(modeling.ModelConfig.whisper_tiny(), **small)

    def call(model: Any, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        features, tokens = inputs
        return model.decoder(tokens, None, model.encoder(features), None, False)

    inputs = (jax.random.normal(jax.random.key(2), (2, 8, 8)), TOKENS)
    return Called(modeling.Whisper(config, rngs=nnx.Rngs(0)), call), inputs


@peer("bonsai mamba2", "bonsai")
def _() -> tuple[Called, Any]:
    from bonsai.models.mamba2 import modeling

    config = modeling.ModelConfig(
        vocab_size=64, hidden_size=32, state_size=8, head_dim=16, chunk_size=4, num_hidden_layers=2
    )
    return Called(modeling.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), lambda m, x: m(x)["logits"]), TOKENS
