"""Where a run computes: the mesh of devices, the processes, and the cache of compiled programs."""
