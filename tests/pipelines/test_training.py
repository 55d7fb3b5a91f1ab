"""The training stage: a complete model folder or none, made once, resumed to the same bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import orpo_data
from orpo_data.errors import OrpoError, UsageError
from orpo_data.manifest import digest, read_manifest
from orpo_data.pages.render import markdown
from orpo_train import loop
from pipelines.training import fetch_model, model_fingerprint, train_model

ROOT = Path(__file__).parents[2]
MODEL_FILES = {
    "README.md", "_lineage.ndjson", "_manifest.json", "chat_template.jinja", "config.json", "curves.png",
    "generation_config.json", "metrics.jsonl", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "train.json",
}  # fmt: skip


class PowerCut(BaseException):
    """No code of ours catches this."""


@pytest.fixture
def cut_after_checkpoint(monkeypatch):
    """The run dies right after saving the checkpoint of the given step."""
    save = loop.save_checkpoint

    def arm(at: int) -> None:
        def save_and_die(root, step, *rest, **named):
            save(root, step, *rest, **named)
            if step == at:
                raise PowerCut

        monkeypatch.setattr(loop, "save_checkpoint", save_and_die)

    yield arm
    monkeypatch.setattr(loop, "save_checkpoint", save)


def metrics(model: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]


def test_model_folder_is_complete_and_sound(trained):
    assert {path.name for path in trained.path.iterdir()} == MODEL_FILES
    assert orpo_data.verify(trained.path).ok
    assert [path.name for path in trained.path.parent.iterdir()] == ["model"]


def test_model_opens_in_transformers_with_its_tokenizer(trained, prepared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(trained.path, use_safetensors=True, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(trained.path)
    row = orpo_data.load(prepared / "tokenize", split="train")[0]
    source = orpo_data.scan(prepared / "split").collect().to_dicts()
    pair = next(pair for pair in source if pair["id"] == row["id"])
    prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
    assert list(prompt) == row["chosen_input_ids"][: row["prompt_len"]]
    assert model(torch.tensor([row["chosen_input_ids"]])).logits.isfinite().all()


def test_training_learned(trained, tiny_model_dir):
    training = [line for line in metrics(trained.path) if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert training[-1]["nll_loss"] < training[0]["nll_loss"] - 0.5
    assert (trained.path / "model.safetensors").read_bytes() != (tiny_model_dir / "model.safetensors").read_bytes()
    assert "eval/log_odds_ratio" in trained.metrics


def test_model_manifest_leads_back_to_the_raw_files(trained, prepared, tiny_model_dir):
    manifest = read_manifest(trained.path)
    assert manifest.inputs[0].fingerprint == read_manifest(prepared / "tokenize").fingerprint
    assert (manifest.inputs[1].name, manifest.inputs[1].fingerprint) == (
        str(tiny_model_dir),
        model_fingerprint(tiny_model_dir),
    )
    stages = [node.manifest.stage for node in orpo_data.lineage(trained.path).nodes]
    assert stages == ["ingest", "ingest", "binarize", "clean", "split", "tokenize", "train"]
    row = orpo_data.load(prepared / "tokenize", split="train")[0]["id"]
    (story,) = orpo_data.lineage(trained.path, row).rows
    assert [decision.stage for decision in story.decisions] == ["ingest", "binarize", "clean", "split", "tokenize"]


def test_model_card_says_what_the_model_is(trained, prepared, tiny_model_dir):
    text = (trained.path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["orpo", "preference-optimization"]
    assert "base_model" not in yaml.safe_load(front)  # it is none of the hub's
    data = read_manifest(prepared / "tokenize")
    pairs = sum(shard.rows for shard in data.shards if shard.split == "train")
    assert f"{tiny_model_dir.name} trained on {pairs} preference pairs with the objective `orpo`" in body
    assert f"fingerprint `{data.fingerprint}`" in body
    assert f"Fingerprint `{trained.fingerprint}`" in body
    assert "| lambda | 0.1 |" in body
    assert "covers the chosen answer, averaged over each sequence, then over the pairs" in body
    assert f"| loss | {trained.metrics['loss']:.5g} | {trained.metrics['eval/loss']:.5g} |" in body
    layout = json.loads((trained.path / "train.json").read_text())["layout"]
    assert f"in the layout `{layout}`" in body
    assert "the weights are those of step 6" in body
    assert "![curves](curves.png)" in body


def test_model_card_has_the_recipe_and_the_way_from_the_raw_files(trained, prepared, tiny_training):
    body = (trained.path / "README.md").read_text()
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe["train"] == tiny_training().model_dump(mode="json", by_alias=True)
    assert recipe["tokenize"] == read_manifest(prepared / "tokenize").recipe["tokenize"]
    for node in orpo_data.lineage(prepared / "tokenize").nodes:
        assert f"`{node.manifest.content_hash[:12]}`" in body
        for item in node.manifest.inputs:
            assert item.path is not None or f"- {markdown(item.name)} `{item.fingerprint[:12]}`" in body


def test_model_card_example_runs_with_transformers_alone(trained, monkeypatch, capsys):
    example = (trained.path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(trained.path)
    exec(example.replace("max_new_tokens=200", "max_new_tokens=3"), {})
    assert capsys.readouterr().out


def test_generation_ends_where_the_datasets_answers_end(prepared, tiny_training, tiny_model_dir, tmp_path):
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 0}))
    report = train_model(
        prepared / "tokenize", tiny_training(model=str(base), max_steps=1), tmp_path / "run" / "model", job="test"
    )
    end = orpo_data.load(prepared / "tokenize")[0]["chosen_input_ids"][-1]
    assert json.loads((report.path / "generation_config.json").read_text())["eos_token_id"] == [0, end]


def test_train_json_has_every_setting(trained, tiny_training):
    saved = json.loads((trained.path / "train.json").read_text())
    expected = tiny_training().model_dump(mode="json", by_alias=True)
    assert saved["config"] == expected
    assert (saved["steps"], saved["pairs"]) == (6, 24)


# --- run again -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_model(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained.path, tmp_path / "model"))


def test_unchanged_is_not_trained_again(own_model, prepared, tiny_training, monkeypatch):
    monkeypatch.delattr("pipelines.training.train")
    report = train_model(prepared / "tokenize", tiny_training(), own_model, job="test")
    assert (report.ran, report.why) == (False, "unchanged")


def test_a_moved_base_model_is_the_same_model(own_model, prepared, tiny_training, tiny_model_dir, tmp_path):
    moved = shutil.copytree(tiny_model_dir, tmp_path / "elsewhere")
    assert not train_model(prepared / "tokenize", tiny_training(model=str(moved)), own_model, job="test").ran


def test_changed_setting_trains_again(own_model, trained, prepared, tiny_training):
    report = train_model(prepared / "tokenize", tiny_training(lambda_=1.0), own_model, job="test")
    assert (report.ran, report.why) == (True, "changed: config.lambda: 0.1 -> 1.0")
    assert report.content_hash != trained.content_hash
    assert {path.name for path in own_model.iterdir()} == MODEL_FILES


def test_other_weights_train_again(own_model, prepared, tiny_training, tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(other)
    report = train_model(prepared / "tokenize", tiny_training(model=str(other), max_steps=1), own_model, job="test")
    assert "inputs[1]" in report.why


def test_missing_weights_train_again(own_model, trained, prepared, tiny_training):
    (own_model / "model.safetensors").unlink()
    report = train_model(prepared / "tokenize", tiny_training(), own_model, job="test")
    assert "damaged" in report.why
    assert report.content_hash == trained.content_hash


# --- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumed_run_ends_in_the_same_bytes(trained, prepared, tiny_training, tmp_path, cut_after_checkpoint, step):
    output = tmp_path / "model"
    cut_after_checkpoint(step)
    with pytest.raises(PowerCut):
        train_model(prepared / "tokenize", tiny_training(), output, job="test")
    assert not output.exists()
    cut_after_checkpoint(-1)
    steps_run = []
    with pytest.MonkeyPatch.context() as patch:
        once = loop.optimizer_step
        patch.setattr(loop, "optimizer_step", lambda run, step: steps_run.append(step) or once(run, step))
        report = train_model(prepared / "tokenize", tiny_training(), output, job="test")
    assert steps_run == list(range(step, 6))
    assert report.content_hash == trained.content_hash
    for name in ("model.safetensors", "metrics.jsonl", "train.json", "README.md"):
        assert (output / name).read_bytes() == (trained.path / name).read_bytes()
    assert {path.name for path in output.iterdir()} == MODEL_FILES
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_checkpoints_of_other_settings_are_not_used(prepared, tiny_training, tmp_path, cut_after_checkpoint):
    output = tmp_path / "model"
    cut_after_checkpoint(2)
    with pytest.raises(PowerCut):
        train_model(prepared / "tokenize", tiny_training(), output, job="test")
    cut_after_checkpoint(-1)
    train_model(prepared / "tokenize", tiny_training(seed=7, max_steps=2), output, job="test")
    assert [line["step"] for line in metrics(output) if "loss" in line] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_datasets_run_goes_on_only_when_told_so(
    prepared, tiny_training, tmp_path, cut_after_checkpoint, caplog
):
    """The interrupted run is made another dataset's by what its checkpoint and its folder say."""
    output = tmp_path / "model"
    cut_after_checkpoint(2)
    with pytest.raises(PowerCut):
        train_model(prepared / "tokenize", tiny_training(), output, job="test")
    cut_after_checkpoint(-1)
    (work,) = tmp_path.glob(".model.*.partial")
    (state,) = work.glob("checkpoints/*/state.json")
    document = json.loads(state.read_text()) | {"dataset": "d" * 64}
    del document["checksum"]
    state.write_text(json.dumps(document | {"checksum": digest(document)}, indent=2) + "\n")
    with pytest.raises(OrpoError, match=r"belongs to dataset dddddddddddd.*set train\.resume_other_dataset"):
        train_model(prepared / "tokenize", tiny_training(), output, job="test")
    work.rename(tmp_path / ".model.0123456789ab.partial")
    report = train_model(prepared / "tokenize", tiny_training(resume_other_dataset=True), output, job="test")
    assert report.ran
    assert "belongs to dataset dddddddddddd" in caplog.text
    assert [line["step"] for line in metrics(output) if "loss" in line][:1] != [3], "the old lines are kept"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_run_leaves_the_model_before_it(own_model, prepared, tiny_training, snapshot, cut_after_checkpoint):
    before = snapshot(own_model)
    cut_after_checkpoint(2)
    with pytest.raises(PowerCut):
        train_model(prepared / "tokenize", tiny_training(seed=1), own_model, job="test")
    assert snapshot(own_model) == before


# --- refused ---------------------------------------------------------------------------------------------------------


def test_dataset_of_another_stage_is_refused(prepared, tiny_training, tmp_path):
    with pytest.raises(OrpoError, match=r"split: is the output of split, training needs the output of tokenize"):
        train_model(prepared / "split", tiny_training(), tmp_path / "model", job="test")
    assert list(tmp_path.iterdir()) == []


def test_output_that_holds_something_else_is_refused(prepared, tiny_training, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(OrpoError, match="holds something else"):
        train_model(prepared / "tokenize", tiny_training(), tmp_path / "model", job="test")
    assert (tmp_path / "model" / "thesis.txt").read_text() == "years of work"


def test_a_dataset_is_not_replaced_by_a_model(own_run, prepared, tiny_training, snapshot):
    before = snapshot(own_run / "clean")
    with pytest.raises(OrpoError, match="holds the output of clean"):
        train_model(prepared / "tokenize", tiny_training(), own_run / "clean", job="test")
    assert snapshot(own_run / "clean") == before


@pytest.fixture
def no_training(monkeypatch):
    """Nothing below is to come as far as the model."""
    monkeypatch.delattr("pipelines.training.train")


def test_broken_data_is_refused(own_run, tiny_training, tmp_path, no_training):
    file = own_run / "tokenize" / "train" / "data-00000-of-00002.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(OrpoError, match=r"train/data-00000-of-00002\.arrow: its bytes changed .*orpo verify"):
        train_model(own_run / "tokenize", tiny_training(), tmp_path / "out" / "model", job="test")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(
    prepared, tiny_training, tiny_model_dir, plain_tokenizer_dir, tmp_path, no_training
):
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    shutil.copytree(plain_tokenizer_dir, base, dirs_exist_ok=True)
    with pytest.raises(OrpoError, match=r"train\.model: the tokenizer of .*base is not .*chat-tokenizer"):
        train_model(prepared / "tokenize", tiny_training(model=str(base)), tmp_path / "out" / "model", job="test")
    assert not (tmp_path / "out").exists()


def test_unknown_tracker_is_refused(prepared, tiny_training, tmp_path, no_training):
    with pytest.raises(UsageError, match=r"train\.trackers: unknown tracker 'wandbb'; did you mean 'wandb'"):
        train_model(prepared / "tokenize", tiny_training(trackers=["wandbb"]), tmp_path / "model", job="test")


def test_pickled_weights_are_refused(prepared, tiny_training, tiny_model_dir, tmp_path):
    from safetensors.torch import load_file

    pickled = Path(shutil.copytree(tiny_model_dir, tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(OrpoError, match=r"pytorch_model\.bin is a pickle.*safetensors only\. Convert it") as refusal:
        train_model(prepared / "tokenize", tiny_training(model=str(pickled)), tmp_path / "model", job="test")
    code = str(refusal.value).split('python -c "')[1].rstrip('"')
    exec(code, {})  # what it says to do
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model_dir, pickled))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_model_that_does_not_know_the_tokens_is_refused(prepared, tiny_training, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    with pytest.raises(OrpoError, match=r"token id \d+, the model knows 50"):
        train_model(prepared / "tokenize", tiny_training(model=str(tmp_path / "small")), tmp_path / "m", job="test")
    assert not (tmp_path / "m").exists()


def test_unknown_model_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-model", "no such model!"):
        with pytest.raises(OrpoError, match=r"train\.model: 'no.*is no local folder and cannot be had") as caught:
            fetch_model(name, None)
        assert "\n" not in str(caught.value)


def test_a_hub_that_fails_without_a_word_is_one_line(monkeypatch):
    def fail(*arguments, **options):
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        OrpoError, match=r"'some/model' is no local folder and cannot be had from the hub: TimeoutError$"
    ):
        fetch_model("some/model", None)


# --- the command -----------------------------------------------------------------------------------------------------


def test_train_command_trains_what_the_recipe_says(orpo, recipe_file, own_run, tiny_model_dir):
    recipe = recipe_file(f"train={{model: {tiny_model_dir}, max_steps: 2, batch_size: 4, precision: fp32}}")
    done = orpo("train", recipe, "-o", own_run, "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert (report["ran"], report["path"]) == (True, str(own_run / "model"))
    again = orpo("train", recipe, "-o", own_run)
    assert "(unchanged)" in again.out
    by_parts = orpo(
        "train", "--dataset", own_run / "tokenize", "--model", tiny_model_dir, "-o", own_run / "parts", "--json",
        "--set", "train.max_steps=2", "--set", "train.batch_size=4", "--set", "train.precision=fp32",
    )  # fmt: skip
    assert json.loads(by_parts.out)["content_hash"] == report["content_hash"]


@pytest.mark.slow
def test_two_processes_of_the_command_line_make_one_model(prepared, tiny_model_dir, tmp_path):
    """accelerate launch on CPUs: one process commits, both end well, the weights are those of one process."""
    script = tmp_path / "orpo.py"
    script.write_text("from flows.cli import main\n\nmain()\n")
    settings = ["max_steps=3", "batch_size=4", "micro_batch_size=1", "precision=fp32"]
    for processes in (1, 2):
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "orpo_train/launch/cpu.yaml"),
            *("--num_processes", str(processes)),
            *(script, "train", "--dataset", prepared / "tokenize", "--model", tiny_model_dir),
            *("-o", tmp_path / str(processes), *(word for s in settings for word in ("--set", f"train.{s}"))),
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert [line.startswith("model ") for line in done.stdout.splitlines()] == [True, False]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("1", "2"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
