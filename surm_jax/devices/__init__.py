"""The hardware side of a run: the device mesh, the processes, and the cache of compiled programs."""
