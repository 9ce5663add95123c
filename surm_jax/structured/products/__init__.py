"""The products `x @ M` and `x @ (W + M)`: convolutions, diagonals, and the choice between executions."""
