"""The cache of compiled programs: a run that is repeated or resumed does not compile its step again."""

import jax

from surm_jax.files import cache_root

LARGEST = 2**31


def use_compilation_cache() -> None:
    """Turn on JAX's persistent compilation cache in `<cache>/programs`, unless JAX was given another folder.

    It holds up to 2 GiB, and removes the least recently used programs first. See
    https://docs.jax.dev/en/latest/persistent_compilation_cache.html, also for `JAX_COMPILATION_CACHE_DIR`.
    """
    # JAX defines the attributes of its options when it is imported, so that a type checker does not see them.
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "programs"))
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
        # Reading a program from the disk is hardly faster than compiling it in less than a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
