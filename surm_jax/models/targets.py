"""The layers of our models that methods are put into, by names that papers use."""

from collections.abc import Mapping
from types import MappingProxyType

TARGETS: Mapping[str, str] = MappingProxyType(
    {
        "qkv": r"blocks/\d+/attention/(query|key|value)",
        "qv": r"blocks/\d+/attention/(query|value)",
        "attention": r"blocks/\d+/attention/(query|key|value|out)",
        "mlp": r"blocks/\d+/mlp/(up|down)",
        "houlsby": r"blocks/\d+/(attention|mlp)",
        "pfeiffer": r"blocks/\d+/mlp",
        "all-linear": r"blocks/\d+/(attention/(query|key|value|out)|mlp/(up|down))",
    }
)
"""Named sets of modules for adapters: patterns for `re.fullmatch` over module paths."""

HEAD = (r"head/.*",)
"""Patterns of the parameters of the head: what a new task begins with anew, of RoBERTa the pooler besides."""
