"""LaSt-ViT for CLIP: a pooling that makes patch features dense, in open_clip's factory.

Importing registers the LaSt model names with open_clip (idempotent, no network).
"""

from lazyclip.dense import encode_dense
from lazyclip.factory import load, register
from lazyclip.lowpass import low_pass
from lazyclip.pooling import PoolSpec, last_pool, pool, stability_score, vote_count
from lazyclip.scores import patch_score
from lazyclip.tower import attach, detach, encode_tokens, project

__version__ = "0.1.0"
__all__ = [
    "PoolSpec",
    "attach",
    "detach",
    "encode_dense",
    "encode_tokens",
    "last_pool",
    "load",
    "low_pass",
    "patch_score",
    "pool",
    "project",
    "register",
    "stability_score",
    "vote_count",
]

register()
