import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.base import storage
from pipelines.data import quantiles

pytestmark = pytest.mark.usefixtures("ray_session")


def write_cache(folder, parts):
    for i, values in enumerate(parts):
        status = ["ok"] * len(values) + ["dropped"] * 3
        columns = {"status": status, "score": pa.array([*values, 9e9, 9e9, 9e9], pa.float32())}
        storage.write_table(f"{folder}/parts/{i:05d}.parquet", pa.table(columns))


def test_shares_are_exact_over_all_parts(tmp_path):
    generator = np.random.default_rng(0)
    parts = [np.round(generator.normal(size=n), 2).astype(np.float32) for n in (500, 1, 0, 777)]
    write_cache(tmp_path, parts)
    shares = (0.001, 0.1, 0.3, 0.5, 1.0)
    whole = np.sort(np.concatenate(parts))[::-1]
    expected = [whole[int(np.ceil(share * len(whole))) - 1] for share in shares]
    assert quantiles.thresholds(str(tmp_path), "score", shares) == [float(x) for x in expected]


def test_a_missing_column_and_an_empty_cache_are_refused(tmp_path):
    write_cache(tmp_path, [np.empty(0)])
    with pytest.raises(Exception, match=r"has no column 'beauty'; a score cache's are status, score"):
        quantiles.thresholds(str(tmp_path), "beauty", [0.5])
    with pytest.raises(ValueError, match="scored no pair"):
        quantiles.thresholds(str(tmp_path), "score", [0.5])


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2))
def test_keys_have_the_order_of_the_floats(values):
    array = np.array(values, dtype=np.float32)
    keys = quantiles._to_key(array)
    np.testing.assert_array_equal(array[np.argsort(keys, kind="stable")], np.sort(array))
    np.testing.assert_array_equal(quantiles._from_key(keys), array)
