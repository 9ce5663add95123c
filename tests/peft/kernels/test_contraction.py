import jax.numpy as jnp
import numpy as np
import pytest

from surm_jax.errors import UserError
from surm_jax.peft.kernels.contraction import Contraction

SIZES = dict(zip("abcdefghn", (2, 3, 2, 4, 3, 2, 5, 2, 3), strict=True))


@pytest.mark.parametrize(
    ("equation", "matrix", "entries"),
    [
        ("ab,bc->ac", (3, 2), ()),
        ("abd,dnh->abnh", (4, 6), ()),
        ("abnh,nhd->abd", (6, 4), ()),
        ("abd,cdnh->cabnh", (4, 12), ()),  # A fused kernel: the output begins with an axis of the kernel.
        ("abd,hdn->banh", (4, 6), ()),  # The columns of the matrix have the order of the kernel.
        ("bed,edf->bef", (4, 2), (3,)),
        ("adb,cbde->acbe", (4, 6), (3,)),
        ("nad,bnad->nb", (8, 3), (3,)),
        ("...d,dn->...n", (4, 3), ()),
        ("a...d,ndc->a...cn", (4, 6), ()),
        ("abd,dn->an", (4, 3), ()),  # The inputs are summed over b.
    ],
)
def test_vectors_times_matrices_is_the_einsum(equation, matrix, entries):
    contraction, rng = Contraction.parse(equation), np.random.default_rng(0)
    letters = contraction.inputs.replace("...", "fg")
    x = rng.normal(size=[SIZES[c] for c in letters])
    kernel = rng.normal(size=[SIZES[c] for c in contraction.kernel])
    layout = contraction.layout(kernel.shape)
    assert (layout.matrix, layout.entries) == (matrix, entries)
    matrices = layout.matrices(jnp.asarray(kernel))
    assert matrices.shape == (*entries, *matrix)
    np.testing.assert_array_equal(layout.array(matrices), jnp.asarray(kernel))
    stack = jnp.stack([jnp.asarray(kernel)] * 2)
    np.testing.assert_array_equal(layout.array(layout.matrices(stack)), stack)
    vectors = np.asarray(contraction.vectors(jnp.asarray(x)))
    lead = vectors.shape[len(entries) : -1]
    product = vectors.reshape(*entries, -1, matrix[0]) @ np.asarray(matrices)
    y = contraction.outputs(jnp.asarray(product.reshape(*entries, *lead, matrix[1])), kernel.shape)
    expected = np.einsum(equation, x, kernel)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    back = contraction.results(jnp.asarray(expected))
    np.testing.assert_allclose(back.reshape(product.shape), product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("ab,bc", "does not have the form"),
        ("ab,bc,cd->ad", "does not have the form"),
        ("ab,...c->ac", "ellipsis"),
        ("ab,bb->a", "does not use each axis of the kernel once"),
        ("ab,bcd->ac", "does not use each axis of the kernel once"),
        ("ab,b->ab", "sums over no axis"),
    ],
)
def test_other_equations_are_refused(equation, message):
    with pytest.raises(UserError, match=message):
        Contraction.parse(equation)
