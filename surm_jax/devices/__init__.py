"""Where a run computes: the mesh, the processes, gathering and compilation."""
