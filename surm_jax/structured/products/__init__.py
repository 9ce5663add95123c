"""Products of activations with structured matrices: `x @ M`, and `x @ (W + M)` with a frozen kernel W.

The modules hold convolutions by FFT, dense forms of matrices that are constant along their diagonals, several ways to
compute the products (executions), and the choice of the fastest execution.
"""
