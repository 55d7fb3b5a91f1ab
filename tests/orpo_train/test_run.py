"""What a run is before its first step."""

import platform

import pytest

from orpo_train.run import keep_freed_memory


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_glibc_can_be_told_to_keep_memory() -> None:
    assert keep_freed_memory()
