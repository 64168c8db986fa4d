# SPDX-License-Identifier: Apache-2.0
"""fla_ops under models of transformers, in place.

accelerate(mamba)                                              # Mamba and FalconMamba, on the scan
enable_temporal_sparse(llama, thresholds=0.3, window=128)      # any decoder, with DeltaLLM's attention and cache
"""

OLDEST = (5, 17)  # the first whose cache layers and attention interface are what is used here

try:
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(f"found {transformers.__version__}")
    # What is not in __all__ is for fla_ops.calibration.
    from ._delta_cache import DeltaCache, layer_settings  # noqa: F401
    from ._mamba import AcceleratedFalconMambaMixer, AcceleratedMambaMixer, accelerate, restore
    from ._temporal_sparse import check_arguments, disable_temporal_sparse, enable_temporal_sparse, watching  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fla_ops.integrations.transformers needs transformers >= {OLDEST[0]}.{OLDEST[1]} ({error}). "
        "Install with: pip install 'fla_ops[transformers]'"
    ) from error

__all__ = [
    "AcceleratedFalconMambaMixer",
    "AcceleratedMambaMixer",
    "DeltaCache",
    "accelerate",
    "disable_temporal_sparse",
    "enable_temporal_sparse",
    "restore",
]
