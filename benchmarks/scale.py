"""The arithmetic of docs/scale.md: what a training step holds on a device, and what devices send each other."""

import dataclasses

from experiments.tables import markdown


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The geometry of a transformer.

    Attributes:
        width: Features of the residual stream.
        depth: Blocks.
        heads: Attention heads.
        mlp_width: Features inside the MLP.
        mlp_kernels: Kernels of the MLP: two, or three with a gate.
        vectors: Number of parameters in the biases and norms of a block.
        outside: Number of parameters outside the blocks.
        tokens: Tokens of an example.
        outputs: Outputs for every token; 0 for a classifier, which has one row of logits for an example.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    mlp_kernels: int
    vectors: int
    outside: int
    tokens: int
    outputs: int = 0

    @property
    def block(self) -> int:
        """Number of parameters of a block."""
        return 4 * self.width**2 + self.mlp_kernels * self.width * self.mlp_width + self.vectors

    @property
    def numbers(self) -> int:
        """Number of parameters of the whole model."""
        return self.depth * self.block + self.outside


def vit(width: int, depth: int, heads: int, mlp_width: int, patch: int, image: int, classes: int) -> Transformer:
    """Return the geometry of a ViT with a class token, as in `surm_jax.models`."""
    tokens = 1 + (image // patch) ** 2
    outside = 3 * patch**2 * width + (tokens + 4) * width + (width + 1) * classes
    return Transformer(width, depth, heads, mlp_width, 2, 9 * width + mlp_width, outside, tokens)


# Each model with the number of examples that a device processes in a step. ViT-g/14: Table 2 of
# https://arxiv.org/abs/2106.04560. The decoder has the geometry of Llama 2 7B (https://arxiv.org/abs/2307.09288).
MODELS = {
    "ViT-B/16": (vit(768, 12, 12, 3072, 16, 224, 1000), 64),
    "ViT-g/14": (vit(1408, 40, 16, 6144, 14, 224, 1000), 32),
    "decoder, 7 B": (Transformer(4096, 32, 32, 11008, 3, 2 * 4096, 2 * 32000 * 4096 + 4096, 2048, 32000), 2),
}


def trained_numbers(model: Transformer, method: str) -> int:
    """Return P, the number of trained parameters.

    A circulant pair has two vectors on each of Q, K and V, and LoRA of rank 16 has 32. `full` trains everything.
    """
    vectors = {"circulant": 2, "lora": 32}
    return model.numbers if method == "full" else 3 * model.depth * vectors[method] * model.width


def base_bytes(model: Transformer, fsdp: int, size: int = 2) -> float:
    """Return the bytes of the frozen base on a device. If it is split, the device also holds two whole blocks."""
    return size * (model.numbers / fsdp + (2 * model.block if fsdp > 1 else 0))


def trained_bytes(trained: int) -> int:
    """Return the bytes of what is trained, in float32: value, gradient and the two moments of AdamW."""
    return 16 * trained


def activation_bytes(model: Transformer, examples: int) -> int:
    """Return the bytes of activations in bfloat16 with `config.model.remat=block`."""
    inside = 16 * model.width + 2 * model.mlp_kernels * model.mlp_width + 6 * model.heads * model.tokens
    return examples * model.tokens * (2 * model.depth * model.width + inside + 8 * model.outputs)


def gathered_bytes(numbers: int, fsdp: int, size: int = 2) -> float:
    """Return the bytes that a device receives of a split base in a step: in the forward and in the backward pass."""
    return 2 * size * numbers * (fsdp - 1) / fsdp


def reduced_bytes(trained: int, devices: int) -> float:
    """Return the bytes of the gradient that a device sends in a step: a ring sends nearly everything twice."""
    return 2 * 4 * trained * (devices - 1) / devices


def tables() -> dict[str, str]:
    """Return the table of what each model and method needs, on one device and on eight."""
    rows = []
    for name, (model, examples) in MODELS.items():
        for method in ("circulant", "lora", "full"):
            trained, frozen = trained_numbers(model, method), method != "full"
            # Full fine-tuning keeps a bfloat16 copy of the parameters instead of a frozen base.
            base = base_bytes(model, 1) if frozen else 2 * model.numbers
            row = {"model": name, "method": method, "examples": examples, "trained": trained, "weights GB": base / 1e9}
            row |= {
                "trained GB": trained_bytes(trained) / 1e9,
                "activations GB": activation_bytes(model, examples) / 1e9,
            }
            row |= {"weights GB, fsdp 8": base_bytes(model, 8) / 1e9 if frozen else None}
            row |= {"gathered GB": gathered_bytes(model.numbers, 8) / 1e9 if frozen else None}
            rows.append(row | {"reduced MB": reduced_bytes(trained, 8) / 1e6})
    sizes = dict.fromkeys(("weights GB", "trained GB", "activations GB", "weights GB, fsdp 8", "gathered GB"), ",.2f")
    columns = {"model": "", "method": "", "examples": "d", "trained": ","} | sizes | {"reduced MB": ",.1f"}
    return {"step": markdown(rows, columns)}
