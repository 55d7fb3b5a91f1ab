import logging
from types import SimpleNamespace

from flows import logs


def test_progress_is_logged_now_and_then(caplog, monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 10.0, 12.0, 19.9])
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # other threads keep their own
    caplog.set_level(logging.INFO, "flows")
    show = logs.log_progress("ingest hh")
    for rows in (1_000, 2_000, 3_000, 4_000):  # after 3, 10, 12 and 19.9 seconds
        show("ingest", rows)
    assert caplog.messages == ["ingest hh: 2,000 rows read"]


def test_stage_logs_are_let_through_unless_the_user_chose_a_level():
    loggers = {name: logging.getLogger(name) for name in logs.PACKAGES}
    before = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.NOTSET)
        loggers["orpo_train"].setLevel(logging.ERROR)
        logs.show_stage_logs()
        assert {name: logger.level for name, logger in loggers.items()} == {
            "orpo_data": logging.INFO,
            "orpo_train": logging.ERROR,
            "pipelines": logging.INFO,
            "flows": logging.INFO,
        }
    finally:
        for name, logger in loggers.items():
            logger.setLevel(before[name])
