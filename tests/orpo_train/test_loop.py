"""The training loop: one loss per global batch, its metrics, its files, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from orpo_data.errors import OrpoError
from orpo_train import loop
from orpo_train import run as run_module
from orpo_train.batching import BatchOrder, PairDataset
from orpo_train.loop import TrainReport, train
from orpo_train.metrics import CHOSEN_METRICS, METRICS
from orpo_train.model import SequenceScorer
from orpo_train.objectives import OBJECTIVES, Objective
from orpo_train.reward import RewardScorer
from orpo_train.run import Run, make_optimizer, total_steps
from orpo_train.schedule import learning_rate_factor
from orpo_train.step import optimizer_step

Make = Callable[..., Any]
KNOWN_NAMES = {
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "nll_loss", "log_odds_ratio", "log_odds_chosen"),
}


@pytest.fixture
def run(model_folder: Make, make_table: Make, make_config: Make, tmp_path: Path) -> Callable[..., TrainReport]:
    """train() of a tiny model on ten pairs in tmp_path / "run"."""

    def start(
        kind: str = "llama", table: pa.Table | None = None, held_out: pa.Table | None = None, **settings: Any
    ) -> TrainReport:
        config = make_config(**{"model": str(model_folder(kind)), "epochs": 2} | settings)
        (tmp_path / "run").mkdir(exist_ok=True)
        return train(config, table if table is not None else make_table(10), held_out, tmp_path / "run", "f" * 64)

    return start


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- one number for a global batch -----------------------------------------------------------------------------------


def _run(model: Any, table: pa.Table, config: Any, optimizer: Any, layout: str = "sdpa") -> Run:
    data, accelerator = PairDataset(table), Accelerator(cpu=True)
    kind = RewardScorer if OBJECTIVES[config.objective].scalar_head else SequenceScorer
    scorer, order = kind(model, layout), BatchOrder(data, config.batch_size, config.seed)
    return Run(config, accelerator, scorer, optimizer, data, None, order, layout, total=10)


def _one_step(
    model: Any, table: pa.Table, config: Any, layout: str = "sdpa"
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics of step 0 and the gradients it made."""
    gradients: dict[str, torch.Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    metrics = optimizer_step(_run(model, table, config, Keep(model.parameters(), lr=0.1), layout), 0)
    return metrics, gradients


@settings(max_examples=60)
@given(
    micro=st.one_of(st.none(), st.integers(1, 8)),
    tokens=st.integers(72, 400),
    layout=st.sampled_from(["sdpa", "plain"]),
    one_prompt=st.booleans(),
    scope=st.sampled_from(["response", "prompt+response"]),
    reduction=st.sampled_from(["sequence", "token"]),
    objective=st.sampled_from([*OBJECTIVES]),
    seed=st.integers(0, 20),
)
@example(
    micro=None,
    tokens=72,
    layout="sdpa",
    one_prompt=False,
    scope="response",
    reduction="sequence",
    objective="reward",
    seed=5,
)  # an answer that ends in the padding's token
def test_neither_micro_batches_nor_layout_nor_sharing_change_loss_or_gradient(
    micro: int | None,
    tokens: int,
    layout: str,
    one_prompt: bool,
    scope: str,
    reduction: str,
    objective: str,
    seed: int,
    make_model: Make,
    make_table: Make,
    make_config: Make,
    with_reference: Make,
    naive_loss: Make,
) -> None:
    """Against the loss of the whole batch by full logits and plain autograd, one sequence at a time.

    With `one_prompt` all pairs compare answers to the same prompt, each answer in two pairs.
    """
    table = make_table(7, seed=seed)
    if one_prompt:
        answers = [row["chosen_input_ids"] for row in table.to_pylist()]
        table = make_table([([3, 4, 5], answers[i], answers[i - 1]) for i in range(7)])
    if OBJECTIVES[objective].needs_reference:
        table = with_reference(table, seed)
    config = make_config(
        nll_scope=scope, nll_reduction=reduction, batch_size=7, micro_batch_size=micro, micro_batch_tokens=tokens,
        objective=objective, lambda_=0.5, max_grad_norm=1e9,
    )  # fmt: skip
    head = OBJECTIVES[objective].scalar_head
    model = make_model("llama", scale=3.0, scalar_head=head)
    metrics, gradients = _one_step(model, table, config, layout)
    reference = make_model("llama", scale=3.0, scalar_head=head)
    loss = naive_loss(reference, table, config)
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_short_last_batch_is_normalised_by_its_own_pairs(
    make_model: Make, make_table: Make, make_config: Make, naive_loss: Make
) -> None:
    table, config, model = make_table(7), make_config(batch_size=4), make_model()
    last = BatchOrder(PairDataset(table), 4, config.seed).batch(1)
    expected = naive_loss(model, table.take(last), config).item()
    metrics = optimizer_step(_run(model, table, config, torch.optim.SGD(model.parameters(), lr=0.0)), 1)
    assert metrics["pairs"] == 3
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_exactly_these_files(run: Make, make_table: Make, tmp_path: Path) -> None:
    report = run(held_out=make_table(3, seed=1), save_every=4)
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    model = {"config.json", "generation_config.json", "model.safetensors"}
    saved = ("model.safetensors", "optimizer.safetensors", "state.json", "metrics.jsonl")
    checkpoint = {f"checkpoints/step-000004/{name}" for name in saved}
    assert files == model | checkpoint | {"metrics.jsonl", "curves.png", "train.json"}
    written = json.loads((tmp_path / "run" / "train.json").read_text())
    assert written["metrics"] == report.metrics
    assert written["config"]["lambda"] == 0.1
    assert (written["steps"], written["dataset"]) == (6, "f" * 64)


def test_an_export_has_what_the_models_files_hold_beside_weights(
    run: Make, model_folder: Make, make_table: Make, tmp_path: Path
) -> None:
    folder = model_folder("glm4-moe")
    weights = load_file(folder / "model.safetensors")
    biases = {name: torch.arange(4.0) for name in weights if "e_score_correction_bias" in name}
    assert biases
    own = shutil.copytree(folder, tmp_path / "own")
    save_file(weights | biases, own / "model.safetensors", {"format": "pt"})
    report = run("glm4-moe", model=str(own), held_out=make_table(4), max_steps=2, precision="fp32")
    exported = load_file(tmp_path / "run" / "model.safetensors")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], bias) for name, bias in biases.items())
    assert report.steps == 2


def test_the_report_counts_what_was_read(run: Make, make_table: Make) -> None:
    table = make_table(10)
    report = run(table=table, batch_size=4, epochs=2)
    assert (report.steps, report.pairs, report.tokens) == (6, 20, 2 * PairDataset(table).tokens)
    short = run(table=table, batch_size=4, epochs=2, max_steps=1)
    assert (short.steps, short.pairs) == (1, 4)


def test_metrics_have_the_names_users_know(run: Make, make_table: Make, tmp_path: Path) -> None:
    run(held_out=make_table(3, seed=1), eval_every=2, epochs=1)
    lines = _lines(tmp_path / "run")
    training, evaluations = ([x for x in lines if ("eval/loss" in x) is which] for which in (False, True))
    assert [line["step"] for line in training] == [1, 2, 3]
    assert [line["step"] for line in evaluations] == [0, 2, 3], "before any step, every second, and at the end"
    assert set(METRICS) == KNOWN_NAMES | {"loss"}
    for line in training:
        assert line.keys() == {"step", *METRICS, "grad_norm", "learning_rate", "tokens", "pairs"}
    for line in evaluations:
        assert line.keys() == {"step", *(f"eval/{name}" for name in METRICS)}


def test_metrics_mean_what_they_say(run: Make, make_table: Make, tmp_path: Path) -> None:
    """Per pair means, and with one global batch loss = nll - lambda * log_odds_ratio; a reward is lambda * logp."""
    run(lambda_=0.5, batch_size=10, epochs=1, held_out=make_table(10), learning_rate=1e-12)
    line, held_out = _lines(tmp_path / "run")
    assert line["loss"] == pytest.approx(line["nll_loss"] - 0.5 * line["log_odds_ratio"], rel=1e-5)
    assert line["nll_loss"] == pytest.approx(-line["logps/chosen"], rel=1e-5)
    assert line["rewards/chosen"] == pytest.approx(0.5 * line["logps/chosen"], rel=1e-5)
    assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-5)
    assert 0 <= line["rewards/accuracies"] <= 1
    for name in METRICS:
        assert held_out[f"eval/{name}"] == pytest.approx(line[name], rel=1e-4, abs=1e-5)


def test_log_every_thins_the_lines_and_keeps_the_last(run: Make, tmp_path: Path) -> None:
    run(log_every=4)
    assert [line["step"] for line in _lines(tmp_path / "run")] == [4, 6]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "opt-projected"])
def test_a_tiny_set_is_learnt(kind: str, precision: str, run: Make, make_table: Make, tmp_path: Path) -> None:
    table = make_table(4)
    run(kind, table=table, precision=precision, epochs=15, learning_rate=3e-2, lambda_=0.5)
    first, *_, last = _lines(tmp_path / "run")
    assert last["loss"] < 0.6 * first["loss"]
    assert last["log_odds_chosen"] > first["log_odds_chosen"] + 1
    assert last["rewards/accuracies"] == 1
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_two_runs_of_different_precision_in_one_process(run: Make) -> None:
    assert run(precision="fp32", max_steps=1).metrics["loss"] != run(precision="bf16", max_steps=1).metrics["loss"]


def test_gradient_checkpointing_changes_nothing(run: Make, tmp_path: Path) -> None:
    run(gradient_checkpointing=False)
    plain = (_lines(tmp_path / "run"), load_file(tmp_path / "run" / "model.safetensors"))
    run(gradient_checkpointing=True)
    assert [line["loss"] for line in _lines(tmp_path / "run")] == pytest.approx([line["loss"] for line in plain[0]])
    for name, weight in load_file(tmp_path / "run" / "model.safetensors").items():
        torch.testing.assert_close(weight, plain[1][name])


def test_sft_learns_from_the_chosen_answers_only(run: Make, make_table: Make, tmp_path: Path) -> None:
    rows = [([5], [6, 7], [8, 9]), ([5], [6, 7], [10, 11, 12])]
    weights = []
    for rejected in (0, 1):
        same_chosen = [(prompt, chosen, rows[rejected][2]) for prompt, chosen, _ in rows]
        run(table=make_table(same_chosen), objective="sft", epochs=3)
        weights.append(load_file(tmp_path / "run" / "model.safetensors"))
        for line in _lines(tmp_path / "run"):
            assert line["loss"] == line["nll_loss"]
            facts = {"step", "grad_norm", "learning_rate", "tokens", "pairs"}
            assert line.keys() == {*CHOSEN_METRICS, *facts}, "the rejected answers do not run"
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name])


def test_learning_rates_follow_the_schedule(run: Make, tmp_path: Path) -> None:
    run(schedule="cosine", warmup_steps=2, max_steps=5, learning_rate=0.01)
    rates = [line["learning_rate"] for line in _lines(tmp_path / "run")]
    assert rates == pytest.approx([0.01 * learning_rate_factor("cosine", step, 2, 5) for step in range(5)])


def test_max_steps_stops_within_the_epochs(make_config: Make) -> None:
    assert total_steps(make_config(batch_size=4, epochs=3), 10) == 9
    assert total_steps(make_config(batch_size=4, epochs=3, max_steps=7), 10) == 7
    assert total_steps(make_config(batch_size=4, epochs=3, max_steps=70), 10) == 9


def test_gradients_are_clipped_before_the_step(make_model: Make, make_table: Make, make_config: Make) -> None:
    table = make_table(4)
    metrics, clipped = _one_step(make_model(scale=3.0), table, make_config(max_grad_norm=1e-3))
    norm = torch.stack([gradient.norm() for gradient in clipped.values()]).norm()
    assert metrics["grad_norm"] > 1e-2
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_decay_acts_on_matrices_only(make_model: Make, make_config: Make) -> None:
    groups = make_optimizer(make_model("gpt2"), make_config(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.dim() for p in groups[0]["params"]} == {2}
    assert {p.dim() for p in groups[1]["params"]} == {1}


# --- the best weights ------------------------------------------------------------------------------------------------


def _overfitting(make_table: Make) -> dict[str, Any]:
    """Answers that are learnt by heart, and others of which that makes a bad model soon."""
    train_rows = [([5], [6, 7], [8, 9])] * 4
    held_out = [([5], [8, 9], [6, 7])] * 2
    return {"table": make_table(train_rows), "held_out": make_table(held_out), "learning_rate": 0.05}


def test_an_early_stop_leaves_the_best_weights(run: Make, make_table: Make, tmp_path: Path) -> None:
    settings = _overfitting(make_table) | {"eval_every": 1, "early_stopping": 3, "epochs": 30}
    report = run(**settings, export="best")
    evaluations = {line["step"]: line["eval/loss"] for line in _lines(tmp_path / "run") if "eval/loss" in line}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert report.exported_step == best
    assert report.steps == best + 3 < 30
    assert report.metrics["eval/loss"] == evaluations[best]
    exported = load_file(tmp_path / "run" / "model.safetensors")
    same = run(**_overfitting(make_table) | {"epochs": 30, "max_steps": 30})
    assert same.exported_step == 30
    last = load_file(tmp_path / "run" / "model.safetensors")
    assert any(not torch.equal(exported[name], last[name]) for name in last)


@pytest.mark.parametrize("setting", [{"export": "best"}, {"early_stopping": 2}])
def test_the_best_needs_evaluations(setting: dict[str, Any], make_config: Make) -> None:
    with pytest.raises(ValueError, match="needs eval_every"):
        make_config(**setting)


@pytest.mark.slow
def test_compiled_layers_end_in_the_same_weights(run: Make, tmp_path: Path) -> None:
    weights = []
    for compiled in (False, True):
        run(compile=compiled, epochs=1)
        weights.append(load_file(tmp_path / "run" / "model.safetensors"))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)


# --- what it refuses -------------------------------------------------------------------------------------------------


def _breaking_at(*steps: int) -> Objective:
    """ORPO whose loss is not a number in these calls, from 0."""
    calls = iter(range(1000))

    def loss(pairs: Any, lambda_: float) -> torch.Tensor:
        whole = OBJECTIVES["orpo"].loss(pairs, lambda_)
        return whole * torch.nan if next(calls) in steps else whole

    return Objective(loss)


def test_a_step_that_is_not_finite_is_not_taken_and_its_rows_are_written_down(
    run: Make, make_table: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(10)
    monkeypatch.setattr(run_module, "OBJECTIVES", OBJECTIVES | {"orpo": _breaking_at(1, 2, 4)})
    run(table=table, batch_size=4, nonfinite_steps=3)
    assert [line["step"] for line in _lines(tmp_path / "run")] == [1, 4, 6]
    written = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    order = BatchOrder(PairDataset(table), 4, 42)
    assert [line["step"] for line in written] == [2, 3, 5]
    assert [line["ids"] for line in written] == [[f"pair-{i}" for i in order.batch(s)] for s in (1, 2, 4)]
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_step_that_is_not_taken_is_not_saved(
    run: Make, tmp_path: Path, make_table: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on must know of all that came before: for PPO also how much it has drawn."""
    saved: list[int] = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda root, step, *rest, **how: saved.append(step))
    monkeypatch.setattr(run_module, "OBJECTIVES", OBJECTIVES | {"orpo": _breaking_at(1, 2, 3)})
    run(table=make_table(10), batch_size=4, nonfinite_steps=4, save_every=2)
    assert saved == [6]


def test_steps_that_are_not_taken_change_no_weight(
    make_model: Make, make_table: Make, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "OBJECTIVES", OBJECTIVES | {"orpo": _breaking_at(0)})
    model, config = make_model(), make_config()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    facts = optimizer_step(_run(model, make_table(4), config, make_optimizer(model, config)), 0)
    assert "loss" not in facts
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_too_many_in_a_row_stop_the_run_with_their_rows(
    run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "OBJECTIVES", OBJECTIVES | {"orpo": _breaking_at(0, 2, 3)})
    with pytest.raises(OrpoError, match=r"step 4: loss or gradient not finite, 2 steps in a row.*pair-\d.*nonfinite"):
        run(nonfinite_steps=2)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_want_of_memory_names_the_setting_to_lower(
    error: Exception, run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(loop, "optimizer_step", full)
    with pytest.raises(OrpoError, match=r"not enough memory: lower train\.micro_batch_tokens \(it is 4096\)"):
        run()


def test_other_errors_are_not_explained_away(run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop, "optimizer_step", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run()


def test_a_pair_beyond_the_token_budget_is_refused_before_training(run: Make, tmp_path: Path) -> None:
    with pytest.raises(OrpoError, match=r"row \d.*raise train\.micro_batch_tokens"):
        run(micro_batch_tokens=5)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_data_that_does_not_fit_the_model_is_refused(run: Make, make_table: Make) -> None:
    fits, odd, long = (make_table([row]) for row in (([1], [2], [3]), ([1], [2], [700]), ([1] * 300, [2], [3])))
    for table, held_out, message in ((odd, None, "token id 700"), (fits, odd, "token id 700"), (long, None, "301")):
        with pytest.raises(OrpoError, match=message):
            run(table=table, held_out=held_out)


# --- trackers --------------------------------------------------------------------------------------------------------


class Notes(GeneralTracker):
    """A tracker that remembers."""

    name = "notes"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.logged.append((step, values))


def test_trackers_see_every_line(run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes()
    monkeypatch.setattr(run_module, "Accelerator", lambda **options: Accelerator(**options | {"log_with": [notes]}))
    run(trackers=["notes"])
    assert notes.settings["lambda"] == 0.1
    assert [{"step": step, **values} for step, values in notes.logged] == _lines(tmp_path / "run")


def test_an_empty_train_split_is_refused(run: Make, make_table: Make) -> None:
    with pytest.raises(OrpoError, match="train split is empty"):
        run(table=make_table([]))
