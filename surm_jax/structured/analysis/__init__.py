"""Analysis of matrices: which families approximate a matrix best, its spectrum, and its picture."""
