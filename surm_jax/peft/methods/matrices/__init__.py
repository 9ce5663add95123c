"""The methods that add a structured matrix beside a kernel or in a branch, a file for each family or kind of matrix."""
