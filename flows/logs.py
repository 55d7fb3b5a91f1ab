"""What a flow says while it runs: lines that reach a terminal and Prefect's pages alike."""

import logging
import time

from pipelines.stages import Progress

log = logging.getLogger(__name__)

PACKAGES = ("orpo_data", "orpo_train", "pipelines", "flows")
SECONDS_BETWEEN_LINES = 10.0


def show_stage_logs() -> None:
    """Let through which stage runs and why; a worker would else show warnings only."""
    for name in PACKAGES:
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.INFO)


def log_progress(label: str) -> Progress:
    """Log the rows read so far, at most once in SECONDS_BETWEEN_LINES."""
    last = time.monotonic()

    def show(stage: str, rows: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log.info("%s: %s rows read", label, f"{rows:,}")

    return show
