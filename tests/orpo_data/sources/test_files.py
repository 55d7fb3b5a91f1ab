"""Finding a source's files, wherever they are, and reading their records, however they are written."""

import gzip
import hashlib
import pickle
import shutil
from datetime import date
from decimal import Decimal
from pathlib import Path

import fsspec
import huggingface_hub
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st

from orpo_data import cache
from orpo_data.errors import OrpoError
from orpo_data.places import storage
from orpo_data.schema import RAW
from orpo_data.sources import SOURCES, json_text, tables
from orpo_data.sources.files import RawFile, file_digest, find_files, read_records
from orpo_data.sources.json_text import NOT_UTF8
from orpo_data.steps.parse import Parse

REAL = Path(__file__).parents[4] / "shared" / "data"
LINE = b'{"a": 1}\n'


@pytest.fixture
def tree(tmp_path):
    for name in (
        "b.jsonl",
        "a/x.jsonl.gz",
        "a/y.JSON",
        "a/deep/z.parquet",
        "red-team-attempts/red_team_attempts.jsonl",
        "README.md",
        "a/notes.csv",
        "dataset_info.json",
        "a/_manifest.json",
        ".cache/c.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(LINE)
    return tmp_path


RED_TEAM = "red-team-attempts/red_team_attempts.jsonl"
ALL = ["a/deep/z.parquet", "a/x.jsonl.gz", "a/y.JSON", "b.jsonl", RED_TEAM]


def names(files: list[RawFile]) -> list[str]:
    return [file.name for file in files]


# --- finding ---------------------------------------------------------------------------------------------------------


def test_folder_gives_its_data_files_sorted(tree):
    files = find_files(str(tree))
    assert names(files) == ALL
    assert all(file.path == tree / file.name for file in files)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["b.jsonl"]),
        ("**/*.jsonl", ["b.jsonl", RED_TEAM]),
        ("a/*", ["a/x.jsonl.gz", "a/y.JSON"]),
        ("a/**", ["a/deep/z.parquet", "a/x.jsonl.gz", "a/y.JSON"]),
        ("**/[xy].*", ["a/x.jsonl.gz", "a/y.JSON"]),
        ("b.jsonl", ["b.jsonl"]),
    ],
)
def test_pattern_chooses_by_name(tree, pattern, expected):
    assert names(find_files(str(tree), pattern=pattern)) == expected


def test_excluded_names_are_left_out_even_if_asked_for(tree):
    exclude = SOURCES["hh-rlhf"].exclude
    assert names(find_files(str(tree), exclude=exclude)) == ALL[:-1]
    for path in (f"{tree}/*/*.jsonl", f"{tree}/{RED_TEAM}", f"{tree}/red-team-attempts"):
        with pytest.raises(OrpoError, match=r"red_team_attempts\.jsonl is left out for this dataset"):
            find_files(path, exclude=exclude)


def test_a_compressed_file_that_is_not_read_is_told(tmp_path, caplog):
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet.gz", "d.jsonl.sha256", ".e.jsonl.zst"):
        (tmp_path / name).write_text("{}\n")
    assert [file.name for file in find_files(str(tmp_path))] == ["a.jsonl"]
    assert [record.args[0].name for record in caplog.records] == ["b.jsonl.zst", "c.parquet.gz"]


def test_single_file(tree):
    assert find_files(str(tree / "b.jsonl")) == [RawFile("b.jsonl", tree / "b.jsonl")]


def test_glob_names_are_relative_to_its_fixed_part(tree):
    assert names(find_files(f"{tree}/*/*.jsonl*")) == ["a/x.jsonl.gz", RED_TEAM]
    assert names(find_files(f"{tree}/a/**/*.parquet")) == ["deep/z.parquet"]
    assert names(find_files(f"{tree}/**", pattern="*.jsonl")) == ["b.jsonl"]


def test_relative_paths_and_home(tree, monkeypatch):
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree))
    assert names(find_files("*.jsonl")) == names(find_files("~/*.jsonl")) == ["b.jsonl"]
    assert names(find_files("a")) == ["deep/z.parquet", "x.jsonl.gz", "y.JSON"]


def test_name_with_glob_characters_is_a_file_first(tmp_path):
    (tmp_path / "a[1].jsonl").write_bytes(LINE)
    assert names(find_files(str(tmp_path / "a[1].jsonl"))) == ["a[1].jsonl"]


@pytest.mark.parametrize(
    ("path", "pattern", "message"),
    [
        ("missing.jsonl", None, "missing.jsonl: no such file or folder"),
        ("data/train.jsonl", None, "data/train.jsonl: no such file or folder"),
        ("one/two/three", None, "one/two/three: no such file or folder"),
        ("README.md", None, "README.md: unknown kind of file"),
        ("empty", None, "empty: no data files, looked for .jsonl"),
        ("*.txt", None, r"\*.txt: no data files, looked for .jsonl"),
        ("a", "*.arrow", r"a: no file matches files='\*.arrow', there is for example "),
        ("memory://nothing.jsonl", None, "memory://nothing.jsonl: cannot be read: FileNotFoundError"),
        ("memory://nothing", None, "memory://nothing: cannot be read: FileNotFoundError"),
        ("nowhere://x.jsonl", None, "nowhere://x.jsonl: cannot be read: ValueError: Protocol not known"),
    ],
)
def test_nothing_to_read(tree, monkeypatch, path, pattern, message):
    (tree / "empty").mkdir()
    monkeypatch.chdir(tree)
    with pytest.raises(OrpoError, match=message) as error:
        find_files(path, pattern=pattern)
    assert "\n" not in str(error.value)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("ORPO_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    for name in ("set/b.jsonl", "set/a/x.jsonl", "set/README.md"):
        fs.pipe(f"/{name}", name.encode())
    yield fs
    fs.rm("/set", recursive=True)


@pytest.mark.parametrize(
    ("url", "pattern", "expected"),
    [
        ("memory://set", None, ["a/x.jsonl", "b.jsonl"]),
        ("memory://set/", "*.jsonl", ["b.jsonl"]),
        ("memory://set/b.jsonl", None, ["b.jsonl"]),
        ("memory://set/*/*.jsonl", None, ["a/x.jsonl"]),
        ("memory://set/*.jsonl", None, ["b.jsonl"]),
    ],
)
def test_url_files_are_brought_here(memory, url, pattern, expected):
    files = find_files(url, pattern=pattern)
    assert names(files) == expected
    for file in files:
        assert file.path.read_text().endswith(file.name)


def test_only_what_is_read_is_brought(memory, tmp_path):
    assert names(find_files("memory://set", pattern="**", exclude=("a/*",))) == ["b.jsonl"]
    assert [file.read_text() for file in (tmp_path / "cache" / "files").rglob("*") if file.is_file()] == ["set/b.jsonl"]


def test_nothing_to_read_at_a_url(memory):
    with pytest.raises(OrpoError, match=r"^memory://set: no file matches files='\*\.csv', there is for example "):
        find_files("memory://set", pattern="*.csv")


def test_another_machine_gets_the_file_itself(memory, tmp_path):
    """A worker has neither the driver's cache nor its folders."""
    (file,) = find_files("memory://set/b.jsonl")
    sha256, worker = file_digest(file), pickle.loads(pickle.dumps(file))
    shutil.rmtree(tmp_path / "cache")
    assert worker.here(sha256).path.read_text() == "set/b.jsonl"
    shutil.rmtree(tmp_path / "cache")
    memory.pipe("/set/b.jsonl", b"new")
    with pytest.raises(OrpoError, match="its bytes changed"):
        worker.here(sha256)


def test_another_machine_has_another_file_or_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE)
    file = RawFile("a.jsonl", path)
    sha256 = file_digest(file)
    assert file.here(sha256) == file
    path.write_bytes(LINE + LINE)
    with pytest.raises(OrpoError, match=r"a\.jsonl: is not the same file"):
        file.here(sha256)
    path.unlink()
    with pytest.raises(OrpoError, match=r"a\.jsonl: is not on"):
        file.here(sha256)


@pytest.mark.parametrize("url", ["memory://user:hunter2@set/none.jsonl", "memory://set/none.jsonl?X-Signature=hunter2"])
def test_what_is_secret_in_a_url_is_not_told(memory, url):
    with pytest.raises(OrpoError, match=r"memory://set/none\.jsonl: cannot be read") as caught:
        find_files(url)
    assert "hunter2" not in str(caught.value)


def test_url_is_read_afresh(memory):
    assert find_files("memory://set/b.jsonl")[0].path.read_text() == "set/b.jsonl"
    memory.pipe("/set/b.jsonl", b"new")
    assert find_files("memory://set/b.jsonl")[0].path.read_text() == "new"


@pytest.mark.slow
def test_what_others_put_into_a_bucket_meanwhile_is_seen(s3, monkeypatch):
    """And what they left as it was is not brought again."""
    brought, download = [], cache.download
    monkeypatch.setattr(cache, "download", lambda fs, name: brought.append(name[-7:]) or download(fs, name))
    other = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    for name, line in [("a.jsonl", b"{}"), ("b.jsonl", b"[]"), ("a.jsonl", b"[]")]:
        other.pipe(f"{storage(s3)[1]}/{name}", line)
        files = find_files(str(s3))
        assert files[0].path.read_bytes() == (b"[]" if len(brought) == 3 else b"{}")
    assert names(files) == ["a.jsonl", "b.jsonl"]
    assert brought == ["a.jsonl", "b.jsonl", "a.jsonl"]


def test_query_of_a_url_is_not_part_of_the_name(memory):
    memory.pipe("/set/q.jsonl?download=a/b", b"q.jsonl")
    assert names(find_files("memory://set/q.jsonl?download=a/b")) == ["q.jsonl"]


def test_url_of_unknown_kind(memory):
    with pytest.raises(OrpoError, match="unknown kind of file"):
        find_files("memory://set/README.md")


def test_url_names_that_climb_out_are_left_alone(memory):
    memory.store["/set/../../outside.jsonl"] = memory.store["/set/b.jsonl"]
    try:
        assert names(find_files("memory://set")) == ["a/x.jsonl", "b.jsonl"]
    finally:
        del memory.store["/set/../../outside.jsonl"]


def test_hub_id_is_downloaded_at_its_revision(tree, monkeypatch):
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(tree)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    files = find_files("openbmb/UltraFeedback", "40b4")
    assert names(files) == ALL
    assert {file.revision for file in files} == {"40b4"}
    assert {file.revision for file in find_files(str(tree), "40b4")} == {None}  # nobody looked for it here
    assert [file.remote[1] for file in files] == [f"datasets/openbmb/UltraFeedback@{tree.name}/{name}" for name in ALL]
    assert names(find_files("o/n", pattern="**/*.jsonl", exclude=("**/red*/**",))) == ["b.jsonl"]
    (whole, part) = calls
    assert whole[0] == "openbmb/UltraFeedback"
    assert whole[1]["repo_type"] == "dataset"
    assert whole[1]["revision"] == "40b4"
    assert "*.jsonl.gz" in whole[1]["allow_patterns"]
    # the hub's patterns know no "**": at least what we want must come
    wanted = filter_repo_objects(
        ["b.jsonl", "a/c.jsonl", "red/d.jsonl", "README.md"],
        allow_patterns=part[1]["allow_patterns"],
        ignore_patterns=part[1]["ignore_patterns"],
    )
    assert list(wanted) == ["b.jsonl", "a/c.jsonl"]


@pytest.mark.parametrize("error", [OSError("no network\nat all"), ValueError("bad id"), LocalEntryNotFoundError("x")])
def test_hub_failure_names_id_revision_and_reason(monkeypatch, error):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(OrpoError) as caught:
        find_files("owner/name", "abc")
    message = str(caught.value)
    assert message.startswith("owner/name at revision 'abc': ")
    assert f"{type(error).__name__}: {str(error).splitlines()[0]}" in message
    assert "\n" not in message


def test_hub_without_data(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "never made"))
    with pytest.raises(OrpoError, match="owner/name: no data files"):
        find_files("owner/name")


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, batch_rows: int = 1000) -> list[tuple[int, str]]:
    tables = list(read_records(RawFile(path.name, path), "mine", batch_rows))
    assert all(table.schema == RAW and 0 < len(table) <= batch_rows for table in tables)
    rows = [row for table in tables for row in table.to_pylist()]
    assert all((row["source"], row["source_file"]) == ("mine", path.name) for row in rows)
    return [(row["source_row"], row["record"]) for row in rows]


def test_lines_pass_as_they_are_and_blank_ones_count(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a":  1}\r\n\n  \n{broken\n"\xe2\x80\xa8"\n3')
    assert read(path) == [(0, '{"a":  1}'), (3, "{broken"), (4, '"\u2028"'), (5, "3")]


def test_line_that_is_not_utf8_can_only_be_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"chosen": "caf\xe9"}\n{"chosen": "x\\\xff"}\n' + LINE)
    records = read(path)
    assert records[0] == (0, NOT_UTF8 + '{"chosen": "caf\\xe9"}')
    for _, record in records[:2]:
        with pytest.raises(orjson.JSONDecodeError):
            orjson.loads(record)
    (table,) = read_records(RawFile("a.jsonl", path), "mine")
    assert Parse(dataset="pairs").apply(table).dropped["detail"].to_pylist()[:2] == [
        "line 1: not UTF-8",
        "line 2: not UTF-8",
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_file_has_no_records(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == []


def test_json_array_over_several_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf\n [\n {"a": 1},\n 2, "\xc3\xa9"\n]\n')
    assert read(path) == [(0, '{"a": 1}'), (1, "2"), (2, '"é"')]


def test_json_that_is_neither_an_array_nor_lines(tmp_path):
    (tmp_path / "a.json").write_text('{\n  "data": []\n}\n')
    with pytest.raises(OrpoError, match="neither an array nor JSON lines"):
        read(tmp_path / "a.json")


def test_json_that_is_json_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\n{"a": 1}\n{broken\n')
    assert read(path) == [(1, '{"a": 1}'), (2, "{broken")]


@pytest.mark.parametrize("element", ['{"a": NaN}', '{"a": "\\ud800"}', '{"a": "\\\\\\udc00"}', "Infinity"])
def test_json_element_that_json_forbids_costs_its_row(tmp_path, element):
    path = tmp_path / "a.json"
    path.write_text(f'[1, {element}, "ok"]')
    (_, (row, record), last) = read(path)
    assert (row, last) == (1, (2, '"ok"'))
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(record)


def arrow(path: Path, table: pa.Table, opener=pa.ipc.new_stream) -> Path:
    with opener(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def test_columns_that_json_has_no_form_for_say_what_they_mean(tmp_path):
    """Bytes are text that nobody called so, decimals are numbers; bytes that are no text cost their row."""
    table = pa.table(
        {
            "b": pa.array(["é".encode(), b"\xff"]),
            "d": pa.array([date(2024, 1, 2)] * 2),
            "f": [float("nan")] * 2,
            "n": [None] * 2,
            "s": pa.array([Decimal("4.5")] * 2),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (_, first), (_, second) = read(tmp_path / "a.parquet")
    assert first == '{"b":"é","d":"2024-01-02","f":null,"n":null,"s":4.5}'
    assert second.startswith("not to be written as JSON: 'utf-8' codec can't decode byte 0xff")


PLAIN = st.fixed_dictionaries(
    {
        "text": st.text(st.characters(codec="utf-8"), max_size=5) | st.none(),
        "whole": st.integers(-(2**63), 2**63 - 1),
        "figure": st.floats(width=64) | st.none(),
        "turns": st.lists(
            st.none()
            | st.fixed_dictionaries({"role": st.text(st.characters(codec="utf-8"), max_size=3), "x": st.booleans()})
        )
        | st.none(),
    }
)
TURNS = pa.list_(pa.struct([("role", pa.string()), ("x", pa.bool_())]))
PLAIN_SCHEMA = pa.schema([("text", pa.string()), ("whole", pa.int64()), ("figure", pa.float64()), ("turns", TURNS)])


@given(st.lists(PLAIN, max_size=9))
def test_rows_of_plain_columns_are_written_as_each_row_by_itself(rows):
    batch = pa.RecordBatch.from_pylist(rows, schema=PLAIN_SCHEMA)
    assert tables._is_plain(pa.struct(PLAIN_SCHEMA))
    assert tables._json_columns(batch).to_pylist() == tables._json_rows(batch).to_pylist()


@pytest.mark.parametrize(
    "kind",
    [
        pa.float32(),
        pa.binary(),
        pa.date32(),
        pa.timestamp("s"),
        pa.null(),
        pa.list_(pa.binary()),
        pa.list_(pa.int8(), 2),
        pa.struct([]),
        pa.struct([("a", pa.int8()), ("a", pa.int8())]),
        pa.dictionary(pa.int8(), pa.string()),
        pa.map_(pa.string(), pa.string()),
    ],
)
def test_columns_that_are_not_plain_are_written_row_by_row(kind):
    assert not tables._is_plain(kind)


BROKEN = {
    "cut.jsonl.gz": gzip.compress(LINE * 1000)[:-20],
    "noise.jsonl.gz": LINE,
    "damaged.jsonl.gz": gzip.compress(LINE)[:12] + b"\xff\xff\xff" + gzip.compress(LINE)[15:],
    "cut.json": b'[{"a": 1}, {"a"',
    "object.json": b'{\n "data": []\n}',
    "words.json": b"not json",
    "latin1.json": b'["caf\xe9"]',
    "deep.json": b"[" * 100_000,
    "cut.json.gz": gzip.compress(b"[1, 2]" * 100)[:-9],
    "noise.parquet": b"PAR1 or not",
    "empty.parquet": b"",
    "empty.arrow": b"",
    "noise.arrow": b"neither stream nor file",
    "noise2.arrow": b"ARROW1 and then nothing",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_stops(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(OrpoError, match=f"^{name}: the file is broken: ") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_table_cut_short_stops(tmp_path, kind):
    table, path = pa.table({"a": ["x" * 50] * 20}), tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        arrow(path, table, pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OrpoError, match=f"^{path.name}: the file is broken: "):
        read(path)


def test_text_in_a_table_that_is_not_utf8_stops(tmp_path):
    texts = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    with pytest.raises(OrpoError, match=r"^a\.arrow: the file is broken: ArrowInvalid: "):
        read(arrow(tmp_path / "a.arrow", pa.table({"a": texts})))


def test_stream_cut_between_two_batches_stops(tmp_path):
    table = pa.table({"a": list(range(9))})
    path = arrow(tmp_path / "a.arrow", table)
    path.write_bytes(path.read_bytes()[:-8])  # all batches are whole, but more may have followed
    with pytest.raises(OrpoError, match=r"^a\.arrow: the file is broken: EOFError: no end of stream"):
        read(path)


RECORDS = st.lists(
    st.fixed_dictionaries(
        {"chosen": st.text(st.characters(codec="utf-8"), max_size=5), "score": st.integers(-9, 9) | st.none()}
    ),
    min_size=1,
    max_size=9,
)


@given(RECORDS, st.integers(1, 10))
def test_every_form_gives_the_same_records_in_any_batches(tmp_path_factory, records, batch_rows):
    folder = tmp_path_factory.mktemp("forms")
    lines = b"".join(orjson.dumps(record) + b"\n" for record in records)
    table = pa.Table.from_pylist(records, schema=pa.schema({"chosen": pa.string(), "score": pa.int64()}))
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.json").write_bytes(orjson.dumps(records, option=orjson.OPT_INDENT_2))
    pq.write_table(table, folder / "d.parquet", row_group_size=4)
    arrow(folder / "e.arrow", table)
    arrow(folder / "f.arrow", table, pa.ipc.new_file)
    for file in find_files(str(folder)):
        rows = read(file.path, batch_rows)
        assert rows == read(file.path)
        assert [(row, orjson.loads(record)) for row, record in rows] == list(enumerate(records))


def test_reading_streams(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINE * 500_000)[:-20])
    first = next(read_records(RawFile("a.jsonl.gz", path), "mine", 10))  # the end is broken, the beginning is not
    assert first["source_row"].to_pylist() == list(range(10))


def as_lines(content: bytes) -> list[tuple[int, str]]:
    """What reading JSON lines means, line by line."""
    records, lines = [], content.split(b"\n")
    for row, line in enumerate(lines):
        text = (line if records else line.removeprefix(b"\xef\xbb\xbf")).strip()
        try:
            record = text.decode()
        except UnicodeDecodeError:
            record = NOT_UTF8 + text.decode(errors="backslashreplace")
        if record:
            records.append((row, record))
    return records


PIECES = [
    b"\n",
    b"\n\n",
    b"\r\n",
    b" ",
    b"\t",
    b"\x0b",
    b"\x1c",
    b"\xc2\xa0",
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
    b"\xff",
]
PIECES += [b"\xe2\x80", b"\0", b"{", b'{"a": 1}', b"x" * 20, "é".encode()]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz"])
@given(st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join), st.integers(1, 9), st.integers(1, 40))
def test_lines_are_what_they_are_however_they_are_cut(tmp_path_factory, name, content, batch_rows, chunk):
    path = tmp_path_factory.mktemp("lines") / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "CHUNK", chunk)
        tables = list(read_records(RawFile(name, path), "mine", batch_rows))
    assert all(len(table) == batch_rows for table in tables[:-1])
    assert (
        read(path, batch_rows)
        == [(row["source_row"], row["record"]) for table in tables for row in table.to_pylist()]
        == as_lines(content)
    )


def test_a_copy_of_a_remote_file_is_decompressed_by_the_name_it_has_there(memory):
    memory.pipe("/set/c.jsonl.gz", gzip.compress(LINE))
    (file,) = find_files("memory://set/c.jsonl.gz")
    assert not file.path.name.endswith(".gz")
    assert [len(table) for table in read_records(file, "mine")] == [1]


def test_a_line_of_many_chunks_is_one_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" + b"x" * (3 * json_text.CHUNK) + b"\n2")
    assert [(row, len(record)) for row, record in read(path)] == [(0, 1), (1, 3 * json_text.CHUNK), (2, 1)]


def test_digest_is_that_of_the_content(tree):
    assert file_digest(RawFile("any name", tree / "b.jsonl")) == hashlib.sha256(LINE).hexdigest()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data of ../shared/data is not here")
def test_real_files():
    files = find_files(str(REAL / "hh_rlhf"), exclude=SOURCES["hh-rlhf"].exclude)
    counts = {file.name: sum(len(table) for table in read_records(file, "hh-rlhf")) for file in files}
    assert counts == {
        "harmless-base/test.jsonl.gz": 1515,
        "helpful-base/test.jsonl.gz": 1571,
        "helpful-online/test.jsonl.gz": 750,
        "helpful-rejection-sampled/test.jsonl.gz": 1876,
    }
    (file,) = find_files(str(REAL / "pairs" / "*.gz"))
    assert sum(len(table) for table in read_records(file, "pairs", 7)) == 300
