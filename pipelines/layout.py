"""Where each stage of a run lies."""

from pathlib import Path

from orpo_data.places import as_path


class Layout:
    """The folders below a run's output folder."""

    def __init__(self, output: str | Path) -> None:
        self.root = as_path(output)
        self.binarize = self.root / "binarize"
        self.clean = self.root / "clean"
        self.split = self.root / "split"
        self.tokenize = self.root / "tokenize"
        self.reference = self.root / "reference"
        self.model = self.root / "model"
        self.evaluate = self.root / "evaluate"

    def ingest(self, source: str) -> Path:
        return self.root / "ingest" / source
