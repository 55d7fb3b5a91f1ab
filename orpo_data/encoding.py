"""Texts to token ids, exactly as the tokenizer gives them."""

from itertools import chain

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer


class Encoder:
    """Encodes columns of text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: pa.StringArray) -> pa.ListArray:
        """Token ids of each text as list<int32>, nothing added; a text may hold no control token."""
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, found)], dtype=np.int32)
        ids = np.fromiter(chain.from_iterable(found), np.int32, count=int(offsets[-1]))
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))
