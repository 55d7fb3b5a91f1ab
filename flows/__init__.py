"""The pipeline as Prefect flows.

Prefect reads its settings when it is imported, so what this project wants of it is said here, before that. Whatever the
user has set stays.
"""

import os

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")  # with no server configured, one of its own
os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "orpo_data,orpo_train,pipelines,flows")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
