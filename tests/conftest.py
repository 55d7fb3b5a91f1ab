"""What the tests share: small tokenizers, pairs, raw files with planted defects, one prepared run. No network."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings

from orpo_data.schema import PAIRS, pair_id

pytest_plugins = ["tests.browsing"]

os.environ["COLUMNS"] = "300"  # rich reads it on import: what is printed must not depend on where the tests run

if TYPE_CHECKING:
    from orpo_train.config import TrainConfig
    from pipelines.recipe import Recipe
    from pipelines.training import ModelReport

ROOT = Path(__file__).parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"

settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("tests")

PLANTS = ["fern", "oak", "moss", "ivy", "thistle", "clover", "willow", "maple", "nettle", "rowan", "sedge", "heather"]
QUESTIONS = [
    "Why does a {} grow towards the light of the window?",
    "How often should I water the {} that stands in my kitchen?",
    "Write two lines about a {} in the rain.",
    "My neighbour says that {} keeps mice away. Is that so?",
]


@pytest.fixture(autouse=True)
def _no_lineage_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own OpenLineage configuration is none of the tests' business."""
    for name in [name for name in os.environ if name.startswith("OPENLINEAGE")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real preference data beside the project."""
    if not REAL_DATA.is_dir():
        pytest.skip("real data not present: ../shared/data")
    return REAL_DATA


# --- object storage --------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of fsspec's storage in memory, which has no renames, like S3; with a cache of its own."""
    from fsspec.implementations.memory import MemoryFileSystem

    from orpo_data.places import as_path

    monkeypatch.setenv("ORPO_CACHE", str(tmp_path / "cache"))
    yield as_path("memory://bucket/run")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["local", "memory"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of this machine, then one of a storage."""
    folder: Path = tmp_path if request.param == "local" else request.getfixturevalue("memory")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server: a process of its own on this machine, gone with the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a bucket of its own, and in the environment what a client needs; with a cache of its own."""
    from orpo_data.places import as_path, storage

    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**credentials, "AWS_ENDPOINT_URL": s3_server, "ORPO_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    bucket = as_path(f"s3://bucket-{tmp_path.name.replace('_', '-').lower()[-40:]}")
    fs, name = storage(bucket)
    fs.clear_instance_cache()  # one made for another server
    fs, name = storage(as_path(str(bucket)))
    fs.mkdir(name)
    return bucket / "run"


# --- tokenizers ------------------------------------------------------------------------------------------------------


def _train_bpe(special_tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [question.format(plant) for question in QUESTIONS for plant in PLANTS]
    tokenizer.train_from_iterator([*corpus, "user\nassistant\nsystem\n", "\n\nHuman: \n\nAssistant: "], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with ChatML control tokens and template; it adds nothing to a text."""
    from transformers import PreTrainedTokenizerFast

    from orpo_data.chat import find_template

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train_bpe(special),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=find_template("chatml"),
    )
    folder = tmp_path_factory.mktemp("chat-tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE without template that puts </s> before every text, as OPT's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = _train_bpe(["<pad>", "</s>"])
    end = backend.token_to_id("</s>")
    backend.post_processor = TemplateProcessing(single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", end)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"
    )
    folder = tmp_path_factory.mktemp("plain-tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


# --- pairs -----------------------------------------------------------------------------------------------------------

Turns = list[dict[str, str]]


def _turns(*contents: str) -> Turns:
    """User and assistant in turn, user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _pair(
    prompt: str | Turns = "Q?", chosen: str | Turns = "Yes.", rejected: str | Turns = "No.", **columns: Any
) -> Any:
    """A PAIRS row; a string is one turn of the side's usual role."""
    prompt = _turns(prompt) if isinstance(prompt, str) else prompt
    answers = [[{"role": "assistant", "content": s}] if isinstance(s, str) else s for s in (chosen, rejected)]
    row = dict.fromkeys(PAIRS.names) | {"source": "test", "source_file": "test.jsonl", "source_row": 0}
    row |= {"id": pair_id(prompt, *answers), "prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    return row | columns


@pytest.fixture(scope="session")
def turns() -> Callable[..., Turns]:
    return _turns


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., Any]:
    return _pair


@pytest.fixture(scope="session")
def make_pairs() -> Callable[..., pa.Table]:
    """A PAIRS table of the given rows; of a number, that many healthy ones."""

    def make(rows: int | list[Any]) -> pa.Table:
        if isinstance(rows, int):
            rows = [
                _pair(f"What is {i} and {i}?", f"It is {2 * i}.", f"It is {i}{i}.", source_row=i) for i in range(rows)
            ]
        return pa.Table.from_pylist(rows, schema=PAIRS)

    return make


# --- raw files and a whole run ---------------------------------------------------------------------------------------


def _transcript(*contents: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {content}" for i, content in enumerate(contents))


def _hh_lines() -> Iterator[str]:
    """Forty healthy dialogues, then one of each defect."""
    for i in range(40):
        question = QUESTIONS[i % 4].format(PLANTS[i % 12])
        history = (
            [question] if i % 3 else [question, "What do you think?", f"I read {i} books about the {PLANTS[i % 12]}."]
        )
        good, bad = f"It does so {i} times a year.\n\nThat is usual.", f"No idea, number {i}."
        yield json.dumps({"chosen": _transcript(*history, good), "rejected": _transcript(*history, bad)})
    yield '{"chosen": "\\n\\nHuman: cut'
    defects = {
        "empty_turn": (("Empty?", ""), ("Empty?", "No.")),
        "ends_with_human": (("Hello?", "Hi.", "Still there?"), ("Hello?", "Hi.", "Are you?")),
        "diverges_early": (("A?", "B.", "C?", "D."), ("A?", "X.", "Y?", "Z.")),
        "identical_pair": (("Same?", "Same."), ("Same?", "Same.")),
        "control_token_in_text": (("Token?", "Say <|im_end|> now."), ("Token?", "No.")),
        "prompt_too_long": ((f"{'Count the leaves. ' * 60}", "Many."), (f"{'Count the leaves. ' * 60}", "Few.")),
    }
    for chosen, rejected in defects.values():
        yield json.dumps({"chosen": _transcript(*chosen), "rejected": _transcript(*rejected)})
    shuffled = "\n\nHuman: One.\n\nHuman: Two.\n\nAssistant: "
    yield json.dumps({"chosen": shuffled + "Three.", "rejected": shuffled + "Four."})


def _completion(model: str, response: str, ratings: str, score: float) -> dict[str, Any]:
    """`ratings` has a digit, or - for N/A, for each of the four aspects."""
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    rating = {
        aspect: {"Rating": "N/A" if r == "-" else r, "Rationale": "so"}
        for aspect, r in zip(aspects, ratings, strict=True)
    }
    return {
        "model": model,
        "principle": "helpfulness",
        "custom_system_prompt": f"You are {model}.",
        "response": response,
        "critique": "Fine.",
        "overall_score": score,
        "fine-grained_score": 4.0,
        "annotations": rating,
    }


def _uf_lines() -> Iterator[str]:
    for i in range(20):
        plant = PLANTS[i % 12]
        answers = [
            _completion("alpaca-7b", f"The {plant} likes shade, I say {i}.", "3333", 6.0),
            _completion("gpt-4", f"The {plant} likes light, since {i} leaves face it.", "554-", 9.0),
            _completion("llama-2-7b-chat", f"As for {i}, who knows.", "2-33", 4.0),
            _completion("falcon-40b-instruct", f"{plant.title()}! {i}!", "1112", 2.0),
        ]
        yield json.dumps(_uf_row(f"Describe plant number {i}, a {plant}, to a child of {i + 3} years.", answers))
    a, b = _completion("a", "One.", "4444", 7.0), _completion("b", "Two.", "4444", 7.0)
    yield json.dumps(_uf_row("All alike?", [a, b]))
    yield json.dumps(_uf_row("Only one?", [a]))
    yield json.dumps(_uf_row("Not rated?", [a, _completion("c", "Three.", "----", 5.0)]))


def _uf_row(instruction: str, completions: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "source": "evol_instruct",
        "instruction": instruction,
        "models": [completion["model"] for completion in completions],
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def _write_raw(folder: Path) -> Path:
    (folder / "hh").mkdir(parents=True)
    (folder / "hh" / "train.jsonl").write_text("\n".join(_hh_lines()) + "\n")
    (folder / "uf").mkdir()
    (folder / "uf" / "evol_instruct.jsonl").write_text("\n".join(_uf_lines()) + "\n")
    return folder


@pytest.fixture(scope="session")
def raw_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hh/train.jsonl and uf/evol_instruct.jsonl: a few dozen rows, every structural defect planted once. Read only."""
    return _write_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture
def own_raw_data(tmp_path: Path) -> Path:
    """The same raw files, to be altered."""
    return _write_raw(tmp_path / "raw")


@pytest.fixture(scope="session")
def make_recipe(raw_data: Path, chat_tokenizer_dir: Path) -> Callable[..., "Recipe"]:
    """A recipe over both raw files with `key.path=value` overrides."""
    from pipelines.documents import apply_override
    from pipelines.recipe import Recipe

    def make(*overrides: str, raw: Path = raw_data) -> Recipe:
        document: dict[str, Any] = {
            "name": "test",
            "sources": [
                {"dataset": "hh-rlhf", "path": str(raw / "hh")},
                {"dataset": "ultrafeedback", "path": str(raw / "uf")},
            ],
            "split": {"eval_fraction": 0.2},
            "tokenize": {"tokenizer": str(chat_tokenizer_dir), "max_length": 160, "max_prompt_length": 96},
        }
        for override in overrides:
            apply_override(document, override)
        return Recipe.parse(document)

    return make


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., "Recipe"]) -> Path:
    """Output folder of one whole prepare(). Read only: a test that alters it takes a copy."""
    from pipelines import prepare

    output = tmp_path_factory.mktemp("run")
    prepare(make_recipe(), output)
    return output


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, str]]:
    """Every path below a folder, with the sha256 of a file's bytes."""

    def take(folder: Path) -> dict[str, str]:
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in sorted(folder.rglob("*"))
        }

    return take


# --- a tiny model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer_dir: Path) -> Path:
    """A random Llama of two layers with the chat tokenizer's vocabulary."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # matrices this small gain nothing from a second one, and wait for it on a busy machine
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_training(tiny_model_dir: Path) -> Callable[..., "TrainConfig"]:
    """Settings of a few quick steps, with a checkpoint after every second one."""
    from orpo_train.config import TrainConfig

    least = {
        "model": str(tiny_model_dir),
        "learning_rate": 1e-2,
        "max_steps": 6,
        "batch_size": 4,
        "micro_batch_size": 2,
        "save_every": 2,
        "precision": "fp32",
    }
    return lambda **settings: TrainConfig.model_validate(least | settings)


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, prepared: Path, tiny_training: Callable[..., "TrainConfig"]
) -> "ModelReport":
    """One finished training run. Read only."""
    from pipelines.training import train_model

    output = tmp_path_factory.mktemp("trained") / "model"
    return train_model(prepared / "tokenize", tiny_training(), output, job="test")
