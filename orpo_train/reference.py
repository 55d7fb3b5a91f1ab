"""What a reference model makes of pairs: computed once, before training, so that it is never in memory beside it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from orpo_data.schema import ANSWERS
from orpo_train.batching import FloatArray, Limits, PairDataset
from orpo_train.config import TrainConfig
from orpo_train.evaluate import forward_passes
from orpo_train.model import SequenceScorer, best_device, check_fits, choose_layout, load_model


class ReferenceModel:
    """The model in a local folder, loaded when first asked and run as `config` would train it.

    Safe to call from several threads: they take turns.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self.folder, self.config = folder, config
        self._scorer: SequenceScorer | None = None
        self._lock = threading.Lock()

    def answer_logps(self, table: pa.Table, *, rejected: bool = True) -> FloatArray:
        """[pairs, 2] log p(answer | prompt) of TOKENIZED pairs, summed over the answers' tokens.

        With `rejected` off only the chosen answers run, and the second column is NaN.
        Raises OrpoError when the model cannot be loaded or does not know the ids.
        """
        data = PairDataset(table)
        logps = np.full((len(data), 2), np.nan, np.float32)
        with self._lock:
            scorer = self._ready(data)
            limits = Limits(max(self.config.micro_batch_tokens, 2 * data.longest))
            sides = ANSWERS if rejected else ANSWERS[:1]
            everything = np.arange(len(data))
            for micro, batch, values in forward_passes(scorer, data, everything, "response", limits, sides=sides):
                sums = scorer.sums(values, batch)
                places = [pair for tree in micro.trees for pair in tree.pairs]
                both = (sums.chosen * sums.chosen_tokens, sums.rejected * sums.rejected_tokens)
                logps[places] = torch.stack(both, dim=1).cpu().numpy()
        return logps

    def _ready(self, data: PairDataset) -> SequenceScorer:
        if self._scorer is None:
            device = best_device()
            code = self.config.trust_remote_code
            model = load_model(self.folder, trust_remote_code=code).to(device)
            layout = choose_layout(model, data, self.config.layout)
            self._scorer = SequenceScorer(model, layout, self.config.precision)
        check_fits(self._scorer.model, data)
        return self._scorer


def answers_to_other_prompts(table: pa.Table, max_length: int) -> pa.Array:
    """Each row's prompt with the chosen answer of the next row that has another prompt, the last with the first's.

    This is how KTO sees how far a model has moved from its reference (arXiv 2402.01306, section 4.1). Sequences are cut
    at `max_length` tokens, but never before the first token of an answer.
    """
    data = PairDataset(table)
    return pa.array(_joined(data, max_length), pa.list_(pa.int32()))


def _joined(data: PairDataset, max_length: int) -> Iterator[np.ndarray[tuple[int], np.dtype[np.int32]]]:
    if not len(data):
        return
    number = data.prompt_number
    first_of = np.searchsorted(number, np.arange(number[-1] + 1))
    for pair in range(len(data)):
        other = int(first_of[(number[pair] + 1) % len(first_of)])
        prompt = data.prompt(pair)
        ids = np.concatenate([prompt, data.response(other, "chosen")])
        yield ids[: max(max_length, len(prompt) + 1)]
