"""From TOKENIZED rows to padded tensors, for any training loop on torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label that torch's cross_entropy, and with it every trainer, leaves out


@dataclass(frozen=True)
class PairCollator:
    """Pads a batch of TOKENIZED rows on the right, both sides to one length, so that they can be stacked.

    Returns int64 tensors of shape [batch, tokens]: input_ids, attention_mask and labels of `chosen` and of `rejected`.
    Labels are the ids themselves (models shift them), and -100 on the prompt and on the padding. Torch is imported when
    it is called, not before.

    >>> collate = PairCollator(pad_token_id=0)
    >>> batch = collate([{"chosen_input_ids": [5, 6, 7, 8], "rejected_input_ids": [5, 6, 9], "prompt_len": 2}])
    >>> [batch[f"rejected_{name}"].tolist() for name in ("input_ids", "attention_mask", "labels")]
    [[[5, 6, 9, 0]], [[1, 1, 1, 0]], [[-100, -100, 9, -100]]]

    With transformers' Trainer set `remove_unused_columns=False`, or it takes the columns away before they come here.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, "torch.Tensor"]:
        import torch

        longest = max(len(row[f"{side}_input_ids"]) for row in rows for side in ("chosen", "rejected"))
        shape = (len(rows), longest + -longest % self.pad_to_multiple_of)
        batch: dict[str, torch.Tensor] = {}
        for side in ("chosen", "rejected"):
            ids = torch.full(shape, self.pad_token_id)
            mask = torch.zeros(shape, dtype=torch.int64)
            labels = torch.full(shape, IGNORED)
            for i, row in enumerate(rows):
                sequence = torch.as_tensor(row[f"{side}_input_ids"])
                start, end = int(row["prompt_len"]), len(sequence)
                ids[i, :end] = sequence
                mask[i, :end] = 1
                labels[i, start:end] = sequence[start:]
            batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
        return batch
