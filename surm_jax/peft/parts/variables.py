"""The kinds of variables that an adapter brings into a model. They select what is trained, saved and fingerprinted."""

from flax import nnx


class AdapterParam(nnx.Param):
    """A parameter that an adapter brought. This type selects what is trained; it is float32 over any base."""


class AdapterConstant(nnx.Variable):
    """Numbers that an adapter brought and does not train, such as the frozen factor of LoRA-FIX; saved with it."""


class AdapterScale(nnx.Variable):
    """How much of an adapter counts, float32 of shape (): 1 as trained, 0 switched off. Never trained nor saved."""
