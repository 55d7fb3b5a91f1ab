"""Models as scorers: every architecture against its own logits, the loss against TRL's and against plain autograd."""

import gzip
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from orpo_data.errors import OrpoError
from orpo_data.schema import ANSWERS
from orpo_train.batching import Limits, PairDataset, grow_trees, tree_of
from orpo_train.layout import collate_packed
from orpo_train.logprobs import HeadShape
from orpo_train.model import (
    PLAIN,
    SequenceScorer,
    check_fits,
    check_head,
    choose_layout,
    load_model,
    pair_sums,
    rounded_up,
    sample_pairs,
)

PACKABLE = [
    *("llama", "llama-tied", "gpt2", "opt", "opt-projected", "mistral", "mistral-window", "qwen2", "qwen3"),
    *("phi", "phi3", "gemma3-window", "gemma2-capped", "granite-scaled", "cohere-scaled"),
]
ARCHITECTURES = [(kind, layout) for kind in PACKABLE for layout in ("sdpa", "flex", "plain")]
LEARNERS = ["llama-tied", "gpt2", "opt-projected", "gemma2-capped", "granite-scaled", "mistral-window"]
BOTH_SCOPES = pytest.mark.parametrize("scope", ["response", "prompt+response"])
BOTH_REDUCTIONS = pytest.mark.parametrize("reduction", ["sequence", "token"])
Make = Callable[..., Any]


@pytest.mark.parametrize(("kind", "layout"), ARCHITECTURES)
def test_scorer_equals_the_models_own_logits(kind: str, layout: str, make_model: Make, make_table: Make) -> None:
    """In every layout, against the model's own logits one unpadded sequence at a time; windows of 4, longer texts."""
    model, data = make_model(kind).eval(), PairDataset(make_table(5))
    with torch.no_grad():
        theirs = []
        for pair in range(5):
            for side in ANSWERS:
                ids = torch.tensor(data.ids(pair, side)[None].astype(np.int64))
                logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                theirs.append(logps[data.prompt_len(pair) - 1 :])
        scorer = SequenceScorer(model, layout)
        ours = scorer(scorer.collate(data, [tree_of(data, [pair], ANSWERS) for pair in range(5)], "response"))
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-5, atol=1e-4)
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("kind", ["gpt2", "mistral-window", "opt"])
def test_shared_prompts_and_responses_give_each_pair_its_own_figures(
    kind: str, make_model: Make, make_table: Make
) -> None:
    """Six pairs out of four answers to one prompt, among others, against the plain layout of each pair alone."""
    answers = [[11, 12, 13], [21], [31, 32], [41, 42, 43, 44]]
    rows = [([5, 6, 7], answers[i], answers[j]) for i in range(4) for j in range(i + 1, 4)]
    data = PairDataset(make_table([([8, 9], [1], [2, 3]), *rows, ([8], [1], [2, 3])]))
    model = make_model(kind).eval()
    trees = grow_trees(data, range(8), ANSWERS, Limits(1000))
    assert [(len(tree.pairs), len(tree.responses)) for tree in trees] == [(1, 2), (6, 4), (1, 2)]
    with torch.no_grad():
        plain = SequenceScorer(model)
        alone = [plain.collate(data, [tree_of(data, [pair], ANSWERS)], "prompt+response") for pair in range(8)]
        expected = [pair_sums(plain(batch), batch) for batch in alone]
        scorer = SequenceScorer(model, "sdpa")
        batch = scorer.collate(data, trees, "prompt+response")
        sums = pair_sums(scorer(batch), batch)
    for name, values in vars(sums).items():
        torch.testing.assert_close(values, torch.cat([getattr(one, name) for one in expected]), rtol=1e-5, atol=1e-4)


def test_packed_rows_of_any_length_reach_the_model_in_few_lengths(make_model: Make, make_table: Make) -> None:
    """For each length that it meets, a CPU's matrix library keeps compiled code: memory would grow with the steps."""
    rows = [([5] * prompt, [6] * 20, [7] * 9) for prompt in range(1, 120)]
    model, data = make_model("llama-tied").eval(), PairDataset(make_table(rows))
    seen, scorer = [], SequenceScorer(model, "sdpa")
    model.base_model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    with torch.no_grad():
        for pair in range(0, 119, 7):
            scorer(scorer.collate(data, [tree_of(data, [pair], ANSWERS)], "response"))
    assert set(seen) == {(1, 128), (1, 256)}


@pytest.mark.parametrize(("tokens", "filled"), [(127, [(1, 0)]), (128, []), (129, [(127, 0)])])
def test_a_row_that_is_full_gets_no_branch_of_nothing(
    tokens: int, filled: list[tuple[int, int]], make_table: Make
) -> None:
    """A branch without a token is a block of no rows, which no kernel has to take."""
    data = PairDataset(make_table([([5] * (tokens - 2), [6, 7], [6, 7])]))
    batch = collate_packed(data, [tree_of(data, [0], ANSWERS)], "response")
    full = rounded_up(batch)
    assert full.input_ids.shape == full.position_ids.shape == (1, 128 if tokens <= 128 else 256)
    assert full.branches.lengths == (*batch.branches.lengths, *filled)
    assert (full is batch) == (not filled)


# --- which layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACKABLE)
def test_architectures_that_can_take_it_are_packed(kind: str, make_model: Make, make_table: Make) -> None:
    model = make_model(kind)
    own = model.config._attn_implementation
    assert choose_layout(model, PairDataset(make_table(9)), "auto") == "sdpa"
    assert model.config._attn_implementation == own


@pytest.mark.parametrize(
    ("kind", "why"), [("bloom", "a log-probability differs by"), ("gemma2-attention-capped", "has a softcap")]
)
def test_others_fall_back_and_it_is_said(
    kind: str, why: str, make_model: Make, make_table: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = make_model(kind), PairDataset(make_table(9))
    assert choose_layout(model, data, "auto") == PLAIN
    assert why in caplog.text
    assert "training in the plain layout" in caplog.text
    with pytest.raises(OrpoError, match=rf"train\.layout: sdpa does not suit .*{why}"):
        choose_layout(model, data, "sdpa")
    SequenceScorer(model)  # and the model is as it was


def test_a_backend_that_is_wrong_is_found_out(
    make_model: Make, make_table: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Responses that see each other: wrong by little, and only where a tree has two."""
    from orpo_train import attention

    whole = attention.causal_mask
    monkeypatch.setattr(attention, "causal_mask", lambda before, *rest: whole(before, *rest) & False)
    assert choose_layout(make_model(), PairDataset(make_table(9)), "auto") == PLAIN
    assert "differs by" in caplog.text


def test_a_window_that_short_pairs_do_not_fill_is_found_out(make_model: Make, make_table: Make) -> None:
    """This model's window stands in its mask alone, which packed rows do without."""
    rows = [([5 + n, 6], [7], [8 + n]) for n in range(9)]
    model = make_model("qwen2-moe-window")
    assert choose_layout(model, PairDataset(make_table(rows)), "auto") == "sdpa"
    long = [*range(5, 45)], [7, 9], [8, 10]
    assert choose_layout(model, PairDataset(make_table([*rows, long])), "auto") == PLAIN


def test_what_fills_a_row_has_an_embedding(make_model: Make, make_table: Make) -> None:
    """Where that of id 0 is zero, and a norm takes its root, its gradient would be NaN."""
    data = PairDataset(make_table([([5, 6], [7], [8])]))
    batch = rounded_up(collate_packed(data, [tree_of(data, [0], ANSWERS)], "response"))
    assert (batch.input_ids[0, 4:] == 5).all()


def test_pairs_of_the_shorter_half_are_probed_and_the_longest(make_table: Make) -> None:
    data = PairDataset(make_table([([1] * n, [2], [3]) for n in range(1, 31)]))
    assert sample_pairs(data) == [1, 5, 8, 29]
    assert sample_pairs(PairDataset(make_table(1))) == [0]


# --- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("gemma2-capped", "Gemma2"), ("granite-scaled", "Granite")])
def test_a_head_that_does_more_than_is_known_is_refused(kind: str, name: str, make_model: Make) -> None:
    with pytest.raises(OrpoError, match=f"{name}ForCausalLM: does something between hidden states and logits"):
        check_head(make_model(kind), HeadShape())


def test_a_wrapped_head_is_refused(make_model: Make) -> None:
    class Adapter(torch.nn.Linear):
        pass

    model = make_model("llama")
    model.set_output_embeddings(Adapter(16, 600, bias=False))
    with pytest.raises(OrpoError, match="output head is a Adapter, a plain Linear is needed"):
        SequenceScorer(model)


def test_a_model_without_a_body_of_its_own_is_refused(make_model: Make) -> None:
    model = make_model()
    model.base_model_prefix = "nothing"
    with pytest.raises(OrpoError, match="has no body of its own"):
        SequenceScorer(model)


def test_checking_the_head_leaves_the_model_as_it_was(make_model: Make) -> None:
    for training in (True, False):
        model = make_model("gpt2-dropout").train(training)
        check_head(model, HeadShape())
        assert model.training is training


def test_pair_sums_by_hand() -> None:
    """Prompt token -1, chosen -2 and -4, rejected -3. Means -3 and -3; the NLL covers 1 + 2 + 4 over 3 tokens.

    Two tokens were chosen and one rejected, whose unlikelihood is -log(1 - exp(-3)).
    """
    batch = SimpleNamespace(
        segment=torch.tensor([0, 1, 1, 2]),
        segments=3,
        prompt=torch.tensor([0]),
        chosen=torch.tensor([1]),
        rejected=torch.tensor([2]),
    )
    sums = pair_sums(torch.tensor([-1.0, -2.0, -4.0, -3.0]), batch)  # type: ignore[arg-type]
    expected = [-3.0, -3.0, 7.0, 3.0, 2.0, 1.0, -math.log(1 - math.exp(-3))]
    assert [value.item() for value in vars(sums).values()] == pytest.approx(expected)
    batch.rejected = torch.tensor([], dtype=torch.long)
    assert pair_sums(torch.tensor([-1.0, -2.0, -4.0, -3.0]), batch).rejected.isnan().tolist() == [True]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("layout", ["sdpa", "plain"])
@BOTH_SCOPES
@BOTH_REDUCTIONS
def test_loss_and_every_gradient_equal_plain_autograd(
    kind: str,
    layout: str,
    scope: str,
    reduction: str,
    make_model: Make,
    make_table: Make,
    make_config: Make,
    naive_loss: Make,
    fast_loss: Make,
) -> None:
    config = make_config(nll_scope=scope, nll_reduction=reduction, lambda_=0.7)
    table = make_table(4)
    losses, gradients = [], []
    for loss_of in (partial(fast_loss, layout=layout), naive_loss):
        model = make_model(kind, scale=3.0).eval()
        loss = loss_of(model, table, config)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert gradient is not None, name
        torch.testing.assert_close(
            gradients[0][name], gradient, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def _real_pairs(folder: Path, tokenizer: Any, source: str, count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Short pairs of a published data set as (prompt, chosen, rejected) token ids."""
    file = {"uf": "ultrafeedback_binarized/train.jsonl.gz", "hh": "hh_rlhf/harmless-base/test.jsonl.gz"}[source]
    rows = []
    with gzip.open(folder / file, "rt") as lines:
        for row in map(json.loads, lines):
            if source == "uf":
                texts = (row["prompt"], row["chosen"], row["rejected"])
            else:
                cut = row["chosen"].rfind("Assistant:") + len("Assistant:")
                texts = (row["chosen"][:cut], row["chosen"][cut:], row["rejected"][cut:])
            ids = tuple(tokenizer(text)["input_ids"] for text in texts)
            if all(ids) and len(ids[0]) + max(len(ids[1]), len(ids[2])) <= 256:
                rows.append(ids)
            if len(rows) == count:
                break
    return rows


@pytest.mark.parametrize("source", ["uf", "hh"])
def test_loss_equals_trls_on_real_pairs(
    source: str,
    real_data: Path,
    chat_tokenizer_dir: Path,
    make_model: Make,
    make_table: Make,
    make_config: Make,
    fast_loss: Make,
) -> None:
    """Under TRL's conventions: NLL over prompt and answer, mean over the micro-batch's tokens."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(chat_tokenizer_dir)
    table = make_table(_real_pairs(real_data, tokenizer, source, 12))
    assert len(table) == 12
    config = make_config(nll_scope="prompt+response", nll_reduction="token", lambda_=0.25)
    model = make_model("llama", scale=2.0).eval()
    trainer = orpo.ORPOTrainer.__new__(orpo.ORPOTrainer)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda tensor: tensor)
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    trainer.padding_value, trainer.beta = 0, config.lambda_
    with torch.no_grad():
        theirs, metrics = trainer.get_batch_loss_metrics(model, _trl_batch(table))
        ours = fast_loss(model, table, config)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert metrics["log_odds_chosen"] != 0


def _trl_batch(table: pa.Table) -> dict[str, torch.Tensor]:
    """What TRL's collator makes of such pairs: each side padded at the end, labels of the prompt -100."""
    batch: dict[str, torch.Tensor] = {}
    for side in ("chosen", "rejected"):
        rows = table[f"{side}_input_ids"].to_pylist()
        width = max(map(len, rows))
        ids, mask, labels = (torch.full((len(rows), width), value) for value in (0, 0, -100))
        for i, (row, prompt_len) in enumerate(zip(rows, table["prompt_len"].to_pylist(), strict=True)):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
            labels[i, prompt_len : len(row)] = torch.tensor(row[prompt_len:])
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return batch


# --- loading and fitting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-tied", "opt-projected"])
def test_a_loaded_model_has_the_saved_weights_in_fp32(kind: str, make_model: Make, tmp_path: Path) -> None:
    saved = make_model(kind)
    saved.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(tmp_path).state_dict()
    for name, weight in saved.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], weight.float())


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OrpoError, match=r"train\.model: cannot load") as caught:
        load_model(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(make_model: Make, tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OrpoError, match=r"train\.model: .*is a pickle"):
        load_model(tmp_path)


def test_missing_weights_are_refused(make_model: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OrpoError, match=r"lacks weights, model\.norm\.weight"):
        load_model(tmp_path)


def test_unknown_token_ids_are_refused(make_model: Make, make_table: Make) -> None:
    check_fits(make_model(), PairDataset(make_table([([1], [599], [2])])))
    with pytest.raises(OrpoError, match="token id 600, the model knows 600"):
        check_fits(make_model(), PairDataset(make_table([([1], [2], [600])])))


def test_sequences_beyond_the_models_positions_are_refused(make_model: Make, make_table: Make) -> None:
    check_fits(make_model(), PairDataset(make_table([([1] * 200, [2] * 56, [3])])))
    with pytest.raises(OrpoError, match=r"257 tokens, the model takes 256: lower tokenize\.max_length"):
        check_fits(make_model(), PairDataset(make_table([([1] * 200, [2], [3] * 57)])))


def test_factors_that_hang_on_the_longest_sequence_are_told(
    make_model: Make, make_table: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 32}
    check_fits(model, PairDataset(make_table([([5] * 20, [6] * 12, [7])])))
    assert not caplog.records
    check_fits(model, PairDataset(make_table([([5] * 20, [6] * 13, [7])])))
    assert "tokenize.max_length 32 avoids it" in caplog.text


def test_weights_cut_short_are_one_clear_line(model_folder: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OrpoError, match=r"^train\.model: cannot load '[^\n]*$"):
        load_model(folder)


def test_missing_weights_are_never_made_up(model_folder: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    lost = sorted(tensors)[-1]
    save_file({name: value for name, value in tensors.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(OrpoError, match=f"lacks weights, {lost}"):
        load_model(folder)
