"""The cache of compiled programs on the disk, which saves a repeated or resumed run from compiling again."""

import jax

from surm_jax.files import cache_root

LARGEST = 2**31


def use_compilation_cache() -> None:
    """Turn on JAX's persistent compilation cache, unless the user has already turned it on with another folder.

    The cache is the folder `programs` in `surm_jax.files.cache_root()`. It holds up to 2 GiB, and the least recently
    used programs are removed first. The user can choose another folder with the environment variable
    `JAX_COMPILATION_CACHE_DIR` (https://docs.jax.dev/en/latest/persistent_compilation_cache.html).
    """
    # JAX defines the attributes of its options when it is imported, so that a type checker does not see them.
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "programs"))
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
        # Also store the small programs that prepare a run. There are fifty of them, and together they take a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
