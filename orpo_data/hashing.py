"""SHA-256 of a whole column of texts: what hashlib gives for each of them.

By a plugin of polars: a loop in Python would hold the interpreter's lock, and all other threads would wait.
"""

import numpy as np
import numpy.typing as npt
import polars as pl
import polars_hash as plh


def hex_hashes(texts: pl.Series) -> pl.Series:
    """The first 128 bits for each of n strings or bytes, none of them null: n strings of 32 hexadecimal digits."""
    return texts.to_frame("text").select(plh.col("text").chash.sha2_256().str.head(32)).to_series()


def leading_bits(hashes: pl.Series) -> npt.NDArray[np.uint64]:
    """The first 64 bits of each of n `hex_hashes`: uint64 [n]."""
    return hashes.str.head(16).str.to_integer(base=16, dtype=pl.UInt64).to_numpy()


def number_hashes(texts: pl.Series) -> npt.NDArray[np.uint64]:
    """The first 64 bits for each of n strings or bytes: uint64 [n]."""
    return leading_bits(hex_hashes(texts))
