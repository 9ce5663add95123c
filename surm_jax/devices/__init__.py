"""Where a run computes: the device mesh, the processes, and the cache of compiled programs."""
