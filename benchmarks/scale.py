"""The formulas of `docs/scale.md`: the memory of a training step on each device, and the traffic between devices."""

import dataclasses

from experiments.tables import markdown


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The sizes of a transformer.

    Attributes:
        width: The number of features of the residual stream.
        depth: The number of blocks.
        heads: The number of attention heads.
        mlp_width: The number of features inside the MLP.
        mlp_kernels: The number of kernels of the MLP: two, or three if it has a gate.
        vectors: The number of parameters in the biases and norms of one block.
        outside: The number of parameters outside the blocks.
        tokens: The number of tokens of an example.
        outputs: The number of logits for every token. It is 0 for a classifier, whose single row of logits for each
            example is not counted.
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
        """The number of parameters of one block."""
        return 4 * self.width**2 + self.mlp_kernels * self.width * self.mlp_width + self.vectors

    @property
    def numbers(self) -> int:
        """The number of parameters of the whole model."""
        return self.depth * self.block + self.outside


def vit(width: int, depth: int, heads: int, mlp_width: int, patch: int, image: int, classes: int) -> Transformer:
    """Return the sizes of a ViT with a class token, as in `surm_jax.models`.

    Args:
        width: The number of features of the residual stream.
        depth: The number of blocks.
        heads: The number of attention heads.
        mlp_width: The number of features inside the MLP.
        patch: The side of a patch in pixels.
        image: The side of an image in pixels.
        classes: The number of classes.
    """
    tokens = 1 + (image // patch) ** 2
    outside = 3 * patch**2 * width + (tokens + 4) * width + (width + 1) * classes
    return Transformer(width, depth, heads, mlp_width, 2, 9 * width + mlp_width, outside, tokens)


# The models, each with the number of examples that a device processes in a step. The sizes of ViT-g/14 are those in
# Table 2 of https://arxiv.org/abs/2106.04560, and the decoder's are those of Llama 2 7B
# (https://arxiv.org/abs/2307.09288).
MODELS = {
    "ViT-B/16": (vit(768, 12, 12, 3072, 16, 224, 1000), 64),
    "ViT-g/14": (vit(1408, 40, 16, 6144, 14, 224, 1000), 32),
    "decoder, 7 B": (Transformer(4096, 32, 32, 11008, 3, 2 * 4096, 2 * 32000 * 4096 + 4096, 2048, 32000), 2),
}


def trained_numbers(model: Transformer, method: str) -> int:
    """Return the number that `docs/scale.md` calls P: how many parameters a method trains.

    For each of Q, K and V in every block, `circulant` trains two vectors, and `lora` (of rank 16) trains 32 vectors.
    `full` trains all parameters.
    """
    vectors = {"circulant": 2, "lora": 32}
    return model.numbers if method == "full" else 3 * model.depth * vectors[method] * model.width


def base_bytes(model: Transformer, fsdp: int, size: int = 2) -> float:
    """Return the bytes that the frozen base model takes on each device.

    If it is split over several devices, each device also holds two whole blocks at a time.

    Args:
        model: The sizes of the model.
        fsdp: The number of devices that the base model is split over.
        size: The bytes of one parameter.
    """
    return size * (model.numbers / fsdp + (2 * model.block if fsdp > 1 else 0))


def trained_bytes(trained: int) -> int:
    """Return the bytes that trained parameters take: value, gradient and two moments of AdamW, all in float32."""
    return 16 * trained


def activation_bytes(model: Transformer, examples: int) -> int:
    """Return the bytes of the bfloat16 activations of a training step with `config.model.remat=block`.

    Args:
        model: The sizes of the model.
        examples: The number of examples that a device processes in the step.
    """
    inside = 16 * model.width + 2 * model.mlp_kernels * model.mlp_width + 6 * model.heads * model.tokens
    return examples * model.tokens * (2 * model.depth * model.width + inside + 8 * model.outputs)


def gathered_bytes(numbers: int, fsdp: int, size: int = 2) -> float:
    """Return the bytes of base parameters that each device receives in a step, if the base model is split over devices.

    In the forward pass, and again in the backward pass, each device receives the parameters that other devices hold.

    Args:
        numbers: The number of parameters that are split.
        fsdp: The number of devices that they are split over.
        size: The bytes of one parameter.
    """
    return 2 * size * numbers * (fsdp - 1) / fsdp


def reduced_bytes(trained: int, devices: int) -> float:
    """Return the bytes of gradients that each device sends in a step, to sum them over all devices.

    The sum is an all-reduce on a ring, in which each device sends almost the whole float32 gradient twice.

    Args:
        trained: The number of trained parameters.
        devices: The number of devices.
    """
    return 2 * 4 * trained * (devices - 1) / devices


def tables() -> dict[str, str]:
    """Return the table "step" in markdown.

    It shows the memory and the traffic of a training step for each model and method, on one device and on eight.
    """
    rows = []
    for name, (model, examples) in MODELS.items():
        for method in ("circulant", "lora", "full"):
            trained, frozen = trained_numbers(model, method), method != "full"
            # Full fine-tuning has no frozen base model, but a bfloat16 copy of the trained parameters.
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
