"""Croissant 1.0 metadata (https://docs.mlcommons.org/croissant) of a dataset's parquet files.

Croissant's readers know parquet and not Arrow streams, so the file is written where parquet files are: when a dataset
is pushed.
"""

import re
from collections.abc import Sequence
from datetime import date
from typing import Any

import pyarrow as pa

from orpo_data.chain import title
from orpo_data.manifest import Manifest
from orpo_data.pages.glossary import COLUMNS
from orpo_data.pages.upstream import SourceOfRows
from orpo_data.parquet import ParquetFile

CROISSANT_NAME = "croissant.json"
CITATION = (
    "@misc{hong2024orpo, title={ORPO: Monolithic Preference Optimization without Reference Model}, "
    "author={Hong, Jiwoo and Lee, Noah and Thorne, James}, year={2024}, eprint={2403.07691}, archivePrefix={arXiv}}"
)

CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context that the specification prescribes."""

LICENCES = {"mit": "https://spdx.org/licenses/MIT.html"}


def croissant(
    manifest: Manifest, files: Sequence[ParquetFile], sources: Sequence[SourceOfRows], url: str, published: date
) -> dict[str, Any]:
    """The metadata as JSON-LD: every file with its hash, and for every split a record set with all its columns."""
    rows = ", ".join(f"{file.split} {file.rows:,} rows" for file in files)
    licences = {source.upstream.licence for source in sources}
    stated = {"license": [LICENCES[name] for name in sorted(filter(None, licences))]} if None not in licences else {}
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": re.sub(r"[^\w.-]+", "-", title(manifest)).strip("-"),
        "description": f"Preference data, output of the stage {manifest.stage}: {rows}.",
        "citeAs": CITATION,
        **(stated if licences else {}),
        "url": url,
        "version": f"1.0.0+{manifest.content_hash[:16]}",
        "datePublished": published.isoformat(),
        "distribution": [_file_object(file) for file in files],
        "recordSet": [_record_set(file) for file in files],
    }


def _file_object(file: ParquetFile) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": file.path,
        "name": file.path,
        "contentUrl": file.path,
        "contentSize": f"{file.bytes} B",
        "encodingFormat": "application/x-parquet",
        "sha256": file.sha256,
    }


def _record_set(file: ParquetFile) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": file.split,
        "name": file.split,
        "key": {"@id": f"{file.split}/id"},
        "field": [_field(f"{file.split}/{column.name}", column, file.path) for column in file.schema],
    }


def _field(place: str, column: pa.Field, path: str) -> dict[str, Any]:
    """A column; a list of objects has a field below it for each of their members."""
    repeated = pa.types.is_list(column.type)
    inner = column.type.value_type if repeated else column.type
    described = {
        "@type": "cr:Field",
        "@id": place,
        "name": place,
        "description": COLUMNS.get(column.name, column.name),
        **({"repeated": True} if repeated else {}),
    }
    source = {"fileObject": {"@id": path}, "extract": {"column": column.name}}
    if not pa.types.is_struct(inner):
        return {**described, "dataType": _data_type(inner), "source": source}
    members = [
        {
            "@type": "cr:Field",
            "@id": f"{place}/{member.name}",
            "name": f"{place}/{member.name}",
            "dataType": _data_type(member.type),
            "source": {**source, "transform": {"jsonPath": member.name}},
        }
        for member in inner
    ]
    return {**described, "subField": members}


def _data_type(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"
