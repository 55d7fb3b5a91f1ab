"""RLHF with PPO: the model answers prompts, a reward model judges the answers, the model moves towards better ones.

A step, from top to bottom: answers to a batch of prompts, drawn with the cache of keys and values, and their scores;
the log-probabilities of their tokens under the model and under the one that training began with, and a value of each
token; rewards and advantages; some passes of clipped updates over the same answers. The form is that of Ziegler et al.
2019 (arXiv 1909.08593) and Ouyang et al. 2022 (arXiv 2203.02155), the update that of Schulman et al. 2017
(arXiv 1707.06347), the advantages those of Schulman et al. 2016 (arXiv 1506.02438).

Dropout is off throughout: it would make noise of the ratio between a token's probabilities now and when it was drawn.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from orpo_data.errors import OrpoError
from orpo_data.schema import ANSWERS, TOKEN_IDS
from orpo_train.adapters import load_base
from orpo_train.batching import IntArray, MicroBatch, PairDataset, cut, pack, tree_of
from orpo_train.config import PpoConfig, Sampling, TrainConfig
from orpo_train.evaluate import load_tokenizer
from orpo_train.generate import end_tokens, generate
from orpo_train.layout import Batch
from orpo_train.model import PLAIN, Scorer, SequenceScorer
from orpo_train.objectives.ppo import adapted, clipped_loss, gae, value_loss, whitened
from orpo_train.reward import Judge
from orpo_train.run import Run, set_up
from orpo_train.step import set_learning_rate, update


class PolicyScorer(SequenceScorer):
    """Reads log-probabilities, and values by a linear head on the same hidden states, which is 0 at first."""

    def __init__(self, model: nn.Module, layout: str = PLAIN, precision: str = "fp32") -> None:
        super().__init__(model, layout, precision)
        head = self.model.get_output_embeddings()
        self.value_head = nn.Linear(head.in_features, 1, device=head.weight.device)
        for weight in self.value_head.parameters():
            nn.init.zeros_(weight)

    def read(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[2, K]: log p of each target, and the value of the state it is drawn in."""
        logps = super().read(hidden, batch)
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden[batch.positions].float()).squeeze(-1)
        return torch.stack([logps, values])


@dataclass
class Progress:
    """What moves from step to step and is no weight; the lines of metrics carry it through a checkpoint."""

    kl_weight: float
    answers: int = 0
    tokens: int = 0  # of their prompts, too


@dataclass(frozen=True)
class PpoRun(Run):
    """A run, and what its answers are judged by."""

    judge: Judge
    reference: Scorer | None  # None: the model itself with its adapters off
    ends: frozenset[int]  # tokens that end an answer
    progress: Progress

    @property
    def ppo(self) -> PpoConfig:
        assert self.config.ppo is not None
        return self.config.ppo

    @property
    def trained(self) -> nn.Module:
        """With the value head."""
        return self.bare_scorer

    def restore(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            if "kl_weight" in line:
                self.progress.answers, self.progress.tokens = line["answers_so_far"], line["tokens_so_far"]
                self.progress.kl_weight = self.next_weight(line["kl_weight"], line["kl"])

    def next_weight(self, kl_weight: float, kl: float) -> float:
        """The weight of the KL in the step after one that had these."""
        return adapted(kl_weight, kl, self.ppo.kl_target) if self.ppo.kl_target else kl_weight

    def seen(self, steps: int) -> dict[str, int]:
        """An answer is drawn, then read by the model, its reference and the judge, and learnt from `epochs` times."""
        answers = self.progress.answers
        return {"pairs": answers, "tokens": self.progress.tokens, "forward_passes": answers * (4 + self.ppo.epochs)}


def set_up_ppo(config: TrainConfig, train_table: pa.Table, eval_table: pa.Table | None, work_dir: Path) -> PpoRun:
    """A run over the prompts of TOKENIZED pairs; `work_dir` holds the tokenizer that made them.

    The reference is the model itself with its adapters off, which takes no memory; without adapters it is a frozen
    copy, for the weights themselves move. Raises OrpoError as `set_up` does, and for what PPO cannot run with.
    """
    assert config.ppo is not None
    run = set_up(config, one_of_each_prompt(train_table), eval_table, work_dir, PolicyScorer)
    if run.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise OrpoError("objective ppo draws answers from a whole model: launch it with orpo_train/launch/ddp.yaml")
    longest = max(int(data.prompt_lengths.max()) for data in (run.data, run.held_out) if data)
    if longest + config.ppo.max_new_tokens > config.micro_batch_tokens:
        raise OrpoError(
            f"a prompt has {longest} tokens, with ppo.max_new_tokens ({config.ppo.max_new_tokens}) more than a forward "
            f"pass may hold: raise train.micro_batch_tokens ({config.micro_batch_tokens})"
        )
    device, tokenizer = run.accelerator.device, load_tokenizer(work_dir)
    run.scorer.eval()
    return PpoRun(
        **vars(run),
        judge=Judge.load(config.ppo.reward_model, tokenizer, device),
        reference=None if config.lora else frozen_copy(config, run.layout, device),
        ends=frozenset(end_tokens(run.model, tokenizer) | last_tokens(train_table)),
        progress=Progress(config.ppo.kl),
    )


def one_of_each_prompt(table: pa.Table) -> pa.Table:
    """The first of the rows with one prompt, where they lie together."""
    return table.take(np.flatnonzero(np.diff(PairDataset(table).prompt_number, prepend=-1)))


def last_tokens(table: pa.Table) -> set[int]:
    """What whole answers of the dataset end with: a base model may know another end only."""
    whole = table.filter(pc.invert(table["chosen_truncated"])).slice(0, 100)
    return {ids[-1].as_py() for ids in whole["chosen_input_ids"]}


def frozen_copy(config: TrainConfig, layout: str, device: torch.device) -> Scorer:
    return SequenceScorer(load_base(config).to(device), layout, config.precision).requires_grad_(False).eval()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model that training began with."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """n answers of N tokens together; what there is of tokens stands in a row, answer after answer."""

    data: PairDataset  # prompt and answer as the chosen side of a row
    scores: Tensor  # [n] of the judge, for prompt and answer
    logps: Tensor  # [N] under the model that drew them
    reference: Tensor  # [N] under the one that training began with
    values: Tensor  # [N]
    ended: float  # share that came to an end before the bound

    @property
    def lengths(self) -> IntArray:
        """[n] tokens of each answer."""
        return lengths_of(self.data)

    @property
    def kl(self) -> Tensor:
        """[N]; summed over an answer it is one draw of KL(pi || pi_ref)."""
        return self.logps - self.reference


def lengths_of(data: PairDataset) -> IntArray:
    return data.lengths["chosen"] - data.prompt_lengths


def places(data: PairDataset, answers: Iterable[int]) -> Tensor:
    """Where the tokens of some answers stand among all N."""
    lengths = lengths_of(data)
    first = lengths.cumsum() - lengths
    return torch.from_numpy(np.concatenate([np.arange(first[i], first[i] + lengths[i]) for i in answers]))


def draw_answers(run: PpoRun, data: PairDataset, pairs: IntArray, seed: int) -> Answers:
    """Answers to the prompts of some rows, judged and read; each process draws a share, all of them hold all."""
    accelerator = run.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    prompts = [data.prompt(int(pair)).tolist() for pair in pairs]
    sampling = Sampling(max_new_tokens=run.ppo.max_new_tokens, seed=seed)
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
        mine = generate(run.model, prompts[rank::world], sampling, run.ends)
    scores = run.judge([prompt + answer for prompt, answer in zip(prompts[rank::world], mine, strict=True)])
    shares = [list(zip(mine, scores.tolist(), strict=True))]
    shares = gather_object(shares) if world > 1 else shares
    drawn = [shares[number % world][number // world] for number in range(len(prompts))]
    answers = as_pairs(prompts, [answer for answer, _ in drawn])
    logps, values = read_tokens(run, run.bare_scorer, answers)
    with adapters_off(run.model) if run.reference is None else nullcontext():
        reference, *_ = read_tokens(run, run.reference or run.bare_scorer, answers)
    return Answers(
        data=answers,
        scores=torch.tensor([score for _, score in drawn], device=accelerator.device),
        logps=logps,
        reference=reference,
        values=values,
        ended=sum(answer[-1] in run.ends for answer, _ in drawn) / len(drawn),
    )


def as_pairs(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> PairDataset:
    """Both sides are the answer: what reads pairs reads it."""
    ids = pa.array([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], TOKEN_IDS)
    columns = {"id": [str(number) for number in range(len(ids))], "prompt_len": [len(prompt) for prompt in prompts]}
    return PairDataset(pa.table(columns | dict.fromkeys(("chosen_input_ids", "rejected_input_ids"), ids)))


def passes(run: Run, data: PairDataset, answers: Iterable[int]) -> list[MicroBatch]:
    """This process' forward passes over some answers; all processes have equally many."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    trees = [tree_of(data, [int(answer)], ANSWERS[:1]) for answer in answers]
    made = cut(data, trees, run.limits, world) if run.layout == PLAIN else pack(trees, run.limits, world)
    return made[rank::world]


def answers_in(micro: MicroBatch) -> list[int]:
    """In the order in which their tokens are read."""
    return [tree.pairs[0] for tree in micro.trees]


def read_tokens(run: Run, scorer: Scorer, data: PairDataset) -> Tensor:
    """What a scorer reads of every token, [rows, N], without gradient."""
    found = torch.zeros(2, int(lengths_of(data).sum()), device=run.accelerator.device)
    for micro in passes(run, data, range(len(data))):
        batch = scorer.collate(data, micro.trees, "response").to(found.device)
        with torch.no_grad():
            values = scorer(batch).reshape(-1, len(batch.targets))
        if micro.weight:
            found[: len(values), places(data, answers_in(micro))] = values
    whole: Tensor = run.accelerator.reduce(found, reduction="sum")
    return whole


# --- what the answers teach -------------------------------------------------------------------------------------------


def token_rewards(answers: Answers, kl_weight: float) -> Tensor:
    """[N] -kl_weight * KL of each token, and the judge's score with the last one (arXiv 2203.02155, equation 2)."""
    last = torch.from_numpy(answers.lengths.cumsum() - 1)
    rewards = -kl_weight * answers.kl
    rewards[last] += answers.scores
    return rewards


@dataclass(frozen=True)
class Lesson:
    """Answers, and for each token how much better it was than expected, and what was to be expected, [N]."""

    answers: Answers
    advantages: Tensor
    returns: Tensor


def lesson_of(answers: Answers, kl_weight: float, ppo: PpoConfig) -> Lesson:
    """Advantages by answer, whitened over the tokens of all of them."""
    cuts = answers.lengths.tolist()
    each = zip(
        *(torch.split(row.cpu(), cuts) for row in (token_rewards(answers, kl_weight), answers.values)), strict=True
    )
    advantages = torch.cat([gae(rewards, values, ppo.gamma, ppo.gae_lambda) for rewards, values in each])
    advantages = advantages.to(answers.values.device)
    return Lesson(answers, whitened(advantages), advantages + answers.values)


# --- a step -----------------------------------------------------------------------------------------------------------


def ppo_step(run: PpoRun, step: int) -> dict[str, float]:
    """Answers to a batch of prompts, and the updates they are worth. Returns the step's metrics.

    Where a loss or a gradient is not finite that update is not made, and the metrics have no `loss`.
    """
    config, ppo, progress = run.config, run.ppo, run.progress
    batch = run.order.batch(step)
    answers = draw_answers(run, run.data, batch, _seed(config.seed, step))
    lesson = lesson_of(answers, progress.kl_weight, ppo)
    rate = set_learning_rate(run, step)
    random = np.random.default_rng([config.seed, step])
    updates = [
        learn(run, lesson, part)
        for _ in range(ppo.epochs)
        for part in np.array_split(random.permutation(len(batch)), min(ppo.minibatches, len(batch)))
    ]
    means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    facts = figures(answers, progress.kl_weight) | {"kl_weight": progress.kl_weight}
    progress.kl_weight = run.next_weight(progress.kl_weight, facts["kl"])
    tokens = int(answers.data.lengths["chosen"].sum())
    progress.answers, progress.tokens = progress.answers + len(batch), progress.tokens + tokens
    so_far = {"answers_so_far": progress.answers, "tokens_so_far": progress.tokens}
    facts |= {"learning_rate": rate, "tokens": tokens, "pairs": len(batch), **so_far}
    return means | facts if all(map(math.isfinite, means.values())) else facts | {"grad_norm": means["grad_norm"]}


def learn(run: PpoRun, lesson: Lesson, part: IntArray) -> dict[str, float]:
    """One update from some of the answers: a mean over their tokens, however they are cut into passes."""
    accelerator, ppo, answers = run.accelerator, run.ppo, lesson.answers
    tokens = int(answers.lengths[part].sum())
    sums = torch.zeros(3, device=accelerator.device)
    mine = passes(run, answers.data, part)
    for index, micro in enumerate(mine):
        batch = run.bare_scorer.collate(answers.data, micro.trees, "response").to(accelerator.device)
        at = places(answers.data, answers_in(micro)).to(accelerator.device)
        with nullcontext() if index == len(mine) - 1 else accelerator.no_sync(run.scorer):
            logps, values = run.scorer(batch)
            policy = clipped_loss(logps, answers.logps[at], lesson.advantages[at], ppo.clip)
            value = value_loss(values, answers.values[at], lesson.returns[at], ppo.clip)
            loss = (policy + ppo.value_weight * value).sum()
            accelerator.backward(loss * (micro.weight * accelerator.num_processes / tokens))
        clipped = ((logps - answers.logps[at]).exp() - 1).abs() > ppo.clip
        sums += torch.stack([policy.sum(), value.sum(), clipped.sum()]).detach() * micro.weight
    policy_loss, value_loss_, clip_fraction = (accelerator.reduce(sums, reduction="sum") / tokens).tolist()
    loss_ = policy_loss + ppo.value_weight * value_loss_
    norm = update(run, finite=math.isfinite(loss_))
    names = ("loss", "policy_loss", "value_loss", "clip_fraction", "grad_norm")
    return dict(zip(names, (loss_, policy_loss, value_loss_, clip_fraction, norm), strict=True))


def figures(answers: Answers, kl_weight: float) -> dict[str, float]:
    """Means over the answers: what they score, how far the model has moved, and how long they are."""
    score, kl = answers.scores.mean().item(), answers.kl.sum().item() / len(answers.scores)
    return {
        "score": score,
        "kl": kl,
        "reward": score - kl_weight * kl,
        "answer_tokens": float(answers.lengths.mean()),
        "answers_ended": answers.ended,
    }


def ppo_evaluation(run: PpoRun, data: PairDataset) -> dict[str, float]:
    """Figures of answers to held-out prompts, a batch of them, as eval/...; the loss is minus the reward."""
    pairs: IntArray = np.flatnonzero(np.diff(data.prompt_number, prepend=-1))[: run.config.batch_size]
    found = figures(draw_answers(run, data, pairs, run.config.seed), run.ppo.kl)
    return {f"eval/{name}": value for name, value in ({"loss": -found["reward"]} | found).items()}


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
