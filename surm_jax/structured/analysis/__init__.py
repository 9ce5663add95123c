"""Analysis of matrices: the families that approximate a matrix best, ranks and condition numbers, and pictures."""
