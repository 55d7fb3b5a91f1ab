"""What the quickstart recipe leaves open: where the bundled samples and the base model lie."""

import json
from pathlib import Path

from pipelines.base_model import smollm2

RECIPE = Path(__file__).parent / "quickstart.yaml"
SAMPLES = Path(__file__).parent / "samples"


def quickstart_overrides() -> list[str]:
    """The recipe's open places as `key=value`; the base model is downloaded and converted on first use."""
    model = smollm2()
    places = {
        "sources.0.path": SAMPLES / "ultrafeedback",
        "sources.1.path": SAMPLES / "hh_rlhf",
        "tokenize.tokenizer": model,
        "train.model": model,
    }
    return [f"{key}={json.dumps(str(path))}" for key, path in places.items()]
