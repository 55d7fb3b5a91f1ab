"""Progress of a long stage, as lines in the log: they reach a terminal and Prefect's pages alike."""

import logging
import time

from pipelines.stages import Progress

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


def log_progress(label: str) -> Progress:
    """Log the rows read so far, at most once in SECONDS_BETWEEN_LINES."""
    last = time.monotonic()

    def show(stage: str, rows: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            log.info("%s: %s rows read", label, f"{rows:,}")

    return show
