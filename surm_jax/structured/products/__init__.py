"""How `x @ M` and `x @ (W + M)` are computed: convolutions, diagonals, and the choice between executions."""
