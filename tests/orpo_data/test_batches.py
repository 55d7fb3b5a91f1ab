import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_data import batches
from orpo_data.batches import batches_of, regrouped

TEXTS = st.lists(st.text("ab", max_size=12), max_size=40)


def texts(tables):
    return [text for table in tables for text in table["text"].to_pylist()]


@given(tables=st.lists(TEXTS, max_size=6), rows=st.integers(1, 15), most_bytes=st.sampled_from([1, 50, 200, 1 << 20]))
def test_all_rows_come_in_order_in_batches_of_at_most_so_many(tables, rows, most_bytes):
    expected = [text for table in tables for text in table]
    tables = [pa.table({"text": pa.array(table, pa.string())}) for table in tables]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BATCH_BYTES", most_bytes)
        for found in (list(regrouped(tables, rows)), [b for table in tables for b in batches_of(table, rows)]):
            assert texts(found) == expected
            assert all(1 <= len(table) <= rows for table in found if expected)


@pytest.mark.parametrize("cut", [batches_of, lambda table, rows: regrouped(batches_of(table, 1), rows)])
def test_large_rows_come_few_at_a_time(monkeypatch, cut):
    monkeypatch.setattr(batches, "BATCH_BYTES", 1_000)
    small, large = ({"text": ["x" * size] * 40} for size in (10, 300))
    assert [len(table) for table in cut(pa.table(small), 20)] == [20, 20]
    assert all(0 < len(table) <= 4 for table in cut(pa.table(large), 20))


def test_full_batches_do_not_wait_for_the_next_table():
    asked = []

    def tables():
        for size in (3, 2, 4):
            asked.append(size)
            yield pa.table({"text": ["x"] * size})

    assert len(next(regrouped(tables(), 5))) == 5
    assert asked == [3, 2]
