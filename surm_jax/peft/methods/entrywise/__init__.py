"""The methods that compute the change of a kernel entry by entry, from several matrices or from the kernel itself."""
