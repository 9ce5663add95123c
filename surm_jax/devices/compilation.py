"""Compiled programs are kept on disk: a run that starts again, or with another seed, need not compile its step anew."""

import jax

from surm_jax.files import cache_root

LARGEST = 2**31


def use_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache in `<cache>/programs`, unless JAX was told another place.

    It holds up to 2 GiB; what was not used for longest goes first. See
    https://docs.jax.dev/en/latest/persistent_compilation_cache.html, also for `JAX_COMPILATION_CACHE_DIR`.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "programs"))
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
        # Below a second, reading a program is hardly faster than making it.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
