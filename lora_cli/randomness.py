"""Everything random is a function of the seed and of what it is for, never of what happened before."""

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, for example `derive_seed(0, "dropout", step, micro_batch)`."""
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
