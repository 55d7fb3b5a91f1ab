"""OpenLineage run events of every stage.

Each stage leaves its events in its folder; where openlineage is configured (OPENLINEAGE_URL, openlineage.yml, ...) the
same events also go there, and a server that does not answer costs a warning, never the run.
"""

import logging
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import attr
import pyarrow as pa
from openlineage.client import OpenLineageClient
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.facet_v2 import (
    DatasetFacet,
    RunFacet,
    dataset_version_dataset,
    error_message_run,
    job_type_job,
    output_statistics_output_dataset,
    schema_dataset,
)
from openlineage.client.serde import Serde
from openlineage.client.transport.noop import NoopConfig, NoopTransport
from openlineage.client.uuid import generate_new_uuid

from orpo_data.manifest import Input, Manifest
from orpo_data.places import append, is_local, join

EVENTS_NAME = "_lineage.ndjson"
PRODUCER = "urn:python:orpo"

log = logging.getLogger(__name__)


@attr.define
class StepsRunFacet(RunFacet):
    """Step by step counts and drop reasons, as in the manifest."""

    steps: list[dict[str, Any]] = attr.field(factory=list)


class Recorder:
    """Writes the START, COMPLETE and FAIL events of one run of a stage."""

    def __init__(self, job: str, stage: str, folder: Path, output: Path) -> None:
        self._file = folder / EVENTS_NAME
        self._output = output
        self._run_id = str(generate_new_uuid())
        self._job = Job(
            namespace="orpo",
            name=f"{job}.{stage}",
            facets={"jobType": job_type_job.JobTypeJobFacet("BATCH", "ORPO", jobType="STAGE", producer=PRODUCER)},
        )
        self._inputs: list[InputDataset] = []
        self._client = _configured_client()
        self._started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None and self._started:  # of several processes one tells of the run
            message = error_message_run.ErrorMessageRunFacet(str(error), "python", producer=PRODUCER)
            self._emit(RunState.FAIL, facets={"errorMessage": message})

    def start(self, inputs: Sequence[Input]) -> None:
        if self._file.is_file():  # a run that goes on from one that was killed, perhaps inside a line
            self._file.write_text("".join(line for line in self._file.open() if line.endswith("\n")))
        self._inputs = [self._input_dataset(item) for item in inputs]
        self._emit(RunState.START)
        self._started = True

    def complete(self, manifest: Manifest, schema: pa.Schema | None = None) -> None:
        """The last event before the commit: what came out, by which steps."""
        steps = StepsRunFacet(steps=[step.model_dump(mode="json") for step in manifest.steps], producer=PRODUCER)
        facets: dict[str, Any] = {"version": _version(manifest.content_hash)}
        if schema is not None:
            fields = [schema_dataset.SchemaDatasetFacetFields(name=f.name, type=str(f.type)) for f in schema]
            facets["schema"] = schema_dataset.SchemaDatasetFacet(fields=fields, producer=PRODUCER)
        statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
            rowCount=manifest.rows,
            size=sum(shard.bytes for shard in manifest.shards),
            fileCount=len(manifest.shards),
            producer=PRODUCER,
        )
        namespace, name = _named(self._output)
        output = OutputDataset(
            namespace=namespace,
            name=name,
            facets=facets,
            outputFacets={"outputStatistics": statistics},
        )
        self._emit(RunState.COMPLETE, facets={"orpo_steps": steps}, outputs=[output])

    def _input_dataset(self, item: Input) -> InputDataset:
        namespace, name = _named(join(self._output, item.path)) if item.path else ("file", item.name)
        facets: dict[str, DatasetFacet] = {"version": _version(item.content_hash or item.fingerprint)}
        return InputDataset(namespace=namespace, name=name, facets=facets)

    def _emit(
        self, state: RunState, facets: dict[str, Any] | None = None, outputs: list[OutputDataset] | None = None
    ) -> None:
        event = RunEvent(
            eventTime=datetime.now(UTC).isoformat(),
            run=Run(runId=self._run_id, facets=facets or {}),
            job=self._job,
            eventType=state,
            inputs=self._inputs,
            outputs=outputs or [],
            producer=PRODUCER,
        )
        if not is_local(self._file) or self._file.parent.is_dir():
            append(self._file, Serde.to_json(event) + "\n")
        if self._client is not None:
            try:
                self._client.emit(event)
            except OSError as error:
                log.warning("lineage event not delivered: %s", error)


def _named(folder: Path) -> tuple[str, str]:
    """A dataset as OpenLineage's naming rules have it: `file` and a path, or `s3://bucket` and a key."""
    if is_local(folder):
        return "file", str(folder.resolve())
    parts = urlsplit(str(folder))
    return f"{parts.scheme}://{parts.netloc}", parts.path.lstrip("/")


def _version(content_hash: str) -> dataset_version_dataset.DatasetVersionDatasetFacet:
    return dataset_version_dataset.DatasetVersionDatasetFacet(content_hash, producer=PRODUCER)


def _configured_client() -> OpenLineageClient | None:
    """The client of openlineage's standard configuration, if the user set one up."""
    settings = OpenLineageClient(transport=NoopTransport(NoopConfig())).config
    return OpenLineageClient() if settings.transport or os.environ.get("OPENLINEAGE_URL") else None
