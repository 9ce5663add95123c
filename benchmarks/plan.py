"""What a training step takes on so many chips: bytes, collectives and seconds, by the formulas of docs/scale.md."""

import dataclasses
import math

# Share of the peak that a chip reaches in the products of a transformer: assumed, not measured.
UTILISATION = 0.4


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer, and the work that one chip gets in a step.

    Attributes:
        width: features of the residual stream.
        depth: blocks.
        mlp_width: features inside the MLP.
        mlp_kernels: its kernels: two, or three with a gate.
        heads: of attention.
        vectors: numbers of a block's biases and norms.
        outside: numbers outside the blocks.
        outputs: outputs for every token, 0 where an example has a single row of logits.
        sequence: tokens of an example.
        batch: examples per chip and step.
    """

    width: int
    depth: int
    mlp_width: int
    heads: int
    vectors: int
    outside: int
    sequence: int
    batch: int
    mlp_kernels: int = 2
    outputs: int = 0

    @property
    def block(self) -> int:
        """Numbers of a block."""
        return 4 * self.width**2 + self.mlp_kernels * self.width * self.mlp_width + self.vectors

    @property
    def numbers(self) -> int:
        """Numbers of the model."""
        return self.depth * self.block + self.outside

    @property
    def tokens(self) -> int:
        """Tokens per chip and step."""
        return self.batch * self.sequence


def vit(
    width: int, depth: int, heads: int, mlp_width: int, patch_size: int, *, image_size: int, classes: int, batch: int
) -> Model:
    """A ViT as in `surm_jax.models`, with a class token."""
    sequence = 1 + (image_size // patch_size) ** 2
    outside = 3 * patch_size**2 * width + (sequence + 4) * width + (width + 1) * classes
    return Model(width, depth, mlp_width, heads, 9 * width + mlp_width, outside, sequence, batch)


MODELS = {
    "ViT-B/16": vit(768, 12, 12, 3072, 16, image_size=224, classes=1000, batch=64),
    # Table 2 of https://arxiv.org/abs/2106.04560.
    "ViT-g/14": vit(1408, 40, 16, 6144, 14, image_size=224, classes=1000, batch=32),
    # The geometry of Llama 2 7B (https://arxiv.org/abs/2307.09288), tokens in and out.
    "decoder, 7 B": Model(
        width=4096,
        depth=32,
        mlp_width=11008,
        mlp_kernels=3,
        heads=32,
        vectors=2 * 4096,
        outside=2 * 32000 * 4096 + 4096,
        outputs=32000,
        sequence=2048,
        batch=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator and its network, per chip.

    Attributes:
        flops: bfloat16 operations per second.
        memory: bytes.
        memory_rate: bytes per second between it and the chip.
        near: how many chips the fast network joins.
        near_rate: bytes per second that a chip sends in a ring over the fast network.
        far_rate: the same over the slow network.
        hop: seconds that a message needs at least.
    """

    flops: float
    memory: float
    memory_rate: float
    near: int
    near_rate: float
    far_rate: float
    hop: float


CHIPS = {
    # https://cloud.google.com/tpu/docs/v5e: 400 GB/s in and out over four links, two of which make a ring; 6.4 Tbit/s
    # for the 256 chips of a pod.
    "TPU v5e": Chip(197e12, 16e9, 819e9, 256, 100e9, 3.1e9, 1e-6),
    # https://www.nvidia.com/en-us/data-center/h100, SXM: 900 GB/s in and out within eight; 400 Gbit/s to others.
    "H100": Chip(989e12, 80e9, 3350e9, 8, 450e9, 50e9, 5e-6),
}


def trained_numbers(model: Model, method: str) -> int:
    """Numbers that are trained: on Q, K and V two vectors for a circulant pair, 32 for LoRA of rank 16; or all."""
    vectors = {"circulant": 2, "lora": 32}
    return model.numbers if method == "full" else 3 * model.depth * vectors[method] * model.width


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on so many chips.

    Attributes:
        fsdp: chips that share the frozen base.
    """

    model: Model
    method: str
    chip: Chip
    chips: int
    fsdp: int

    @property
    def base_bytes(self) -> float:
        """Bytes of the frozen base on one chip, in bfloat16.

        Two blocks of a split base are there as a whole: one in use, one on its way.
        """
        if self.method == "full":
            return 0.0
        whole = 2 * 2 * self.model.block if self.fsdp > 1 else 0
        return 2 * self.model.numbers / self.fsdp + whole

    @property
    def trained_bytes(self) -> float:
        """Of what is trained: float32 value, gradient and two moments of AdamW; for `full` a bfloat16 copy beside."""
        return (18 if self.method == "full" else 16) * trained_numbers(self.model, self.method)

    @property
    def activation_bytes(self) -> float:
        """Of activations, `config.model.remat=block`: what each block reads, one block from the inside, and logits."""
        model = self.model
        inside = 2 * (8 * model.width + 2 * model.mlp_kernels * model.mlp_width / 2) + 6 * model.heads * model.sequence
        return model.tokens * (2 * model.depth * model.width + inside + 8 * model.outputs)

    @property
    def bytes(self) -> float:
        """Of all on one chip."""
        return self.base_bytes + self.trained_bytes + self.activation_bytes

    @property
    def gathered_bytes(self) -> float:
        """That a chip receives of the base in a step: once forward, once backward."""
        return 0.0 if self.method == "full" else 2 * 2 * self.model.numbers * (self.fsdp - 1) / self.fsdp

    @property
    def reduced_bytes(self) -> float:
        """That a chip sends of the gradient: a ring sends nearly everything twice."""
        return 2 * 4 * trained_numbers(self.model, self.method) * (self.chips - 1) / self.chips

    @property
    def compute_seconds(self) -> float:
        """Of the base's products: forward, again for the backward pass, gradient of inputs; for `full` of kernels."""
        model = self.model
        forward = 2 * (model.numbers - model.outside) + 4 * model.depth * model.sequence * model.width
        forward += 2 * model.outputs * model.width
        passes = 4 if self.method == "full" else 3
        return passes * forward * model.tokens / (UTILISATION * self.chip.flops)

    @property
    def update_seconds(self) -> float:
        """Of the updates: by the memory that transforms read and write, or by dense products, whichever is less."""
        model = self.model
        rows = 3 * model.depth * model.tokens
        if self.method == "full":
            return 0.0
        if self.method == "lora":
            return rows * 10 * model.width / self.chip.memory_rate
        dense = rows * 8 * model.width**2 / (UTILISATION * self.chip.flops)
        return min(rows * 40 * model.width / self.chip.memory_rate, dense)

    @property
    def gather_seconds(self) -> float:
        """Of gathering the base, block by block."""
        if self.fsdp == 1 or self.method == "full":
            return 0.0
        hops = 2 * self.model.depth * (self.fsdp - 1) * self.chip.hop
        return self.gathered_bytes / self.chip.near_rate + hops

    @property
    def reduce_seconds(self) -> float:
        """Of reducing the gradient: within the fast network, and then, each chip its part, over the slow one."""
        if self.chips == 1:
            return 0.0
        near, groups = min(self.chips, self.chip.near), math.ceil(self.chips / self.chip.near)
        whole = 2 * 4 * trained_numbers(self.model, self.method)
        seconds = whole * (near - 1) / near / self.chip.near_rate
        seconds += whole / near * (groups - 1) / groups / self.chip.far_rate
        # A torus and trees pass a message on in about the square root, or the logarithm, of the number of chips.
        return seconds + 2 * (math.sqrt(near) + math.log2(groups)) * self.chip.hop

    @property
    def seconds(self) -> float:
        """Of a step: gathering goes on beside the products, reducing comes after."""
        return max(self.compute_seconds + self.update_seconds, self.gather_seconds) + self.reduce_seconds

    @property
    def fits(self) -> bool:
        """Whether a tenth of the chip's memory is left."""
        return self.bytes <= 0.9 * self.chip.memory


def plan(model: Model, method: str, chip: Chip, chips: int) -> Plan:
    """Returns the plan that splits the base over as few chips as hold it, within the fast network."""
    for exponent in range(int(math.log2(min(chips, chip.near))) + 1):
        made = Plan(model, method, chip, chips, 2**exponent)
        if made.fits or method == "full":
            break
    return made
