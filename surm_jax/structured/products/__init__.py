"""Products of activations with structured matrices: `x @ M`, and `x @ (W + M)` with a frozen kernel W.

The modules hold several ways to compute them (executions), the choice of the fastest, and convolutions by FFT.
"""
