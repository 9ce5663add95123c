"""Convert the arrays of models between our layout and that of transformers, without files."""

import jax
import numpy as np
from flax import nnx

from surm_jax.pretrained.rules import fill


def read_tree(architecture, config, arrays, fresh=()):
    """Return our model with the arrays of a checkpoint.

    Parameters whose paths begin with an entry of `fresh` are not read, and are zeros.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: architecture.model(config, rngs=nnx.Rngs(0))))
    variables = {"/".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    left_out = {path for path in variables if path.startswith(tuple(fresh))}
    targets = {
        path: jax.ShapeDtypeStruct(variable.shape, variable.dtype)
        for path, (_, variable) in variables.items()
        if path not in left_out
    }
    rules, ignored = architecture.key_rules(config), architecture.ignored(config)
    values = fill(arrays, arrays.get, targets, rules, ignore=ignored, fresh=left_out, origin="the tree")
    values.update({path: np.zeros(variables[path][1].shape, np.float32) for path in left_out})
    return nnx.merge(
        graphdef, nnx.from_flat_state([(path, v.copy(values[name])) for name, (path, v) in variables.items()])
    )


def written_tree(architecture, model):
    """Return the arrays of a checkpoint for our model, including those that only transformers has."""
    tensors = dict(architecture.fillers(model.config))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, tensor = architecture.tensor_name(model.config, "/".join(map(str, path)))
        tensors[name] = tensor.write(np.asarray(variable[...]))
    return tensors
