"""Filters on the json and on the parquet beside a shard; with the real parquet engine, too."""

import importlib.util
import json
from pathlib import Path

import pytest

from lazyclip.base.errors import UserError
from tests.test_manifest import PAIR, kinds, ordinals, prepared
from tests.toy import write_shard
from training.data.filters import read_filter
from training.data.manifest import report

engine = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow, which reads parquet"
)


def shard_with_json(path: Path, values: list) -> None:
    samples = [
        {"jpg": b"a", "json": value if isinstance(value, bytes) else json.dumps(value).encode(),
         "txt": b" " + b"c" * i}
        for i, value in enumerate(values)
    ]  # fmt: skip
    write_shard(path, samples)


VALUES = [
    {"similarity": 0.1, "NSFW": "UNLIKELY", "width": 300},
    {"similarity": 0.3, "NSFW": "NSFW", "width": 256},
    {"similarity": 0.5, "NSFW": "UNLIKELY", "width": 255},
    {"similarity": None, "NSFW": "UNLIKELY", "width": "512"},
    {"NSFW": None},
    b"no json",
    {"similarity": 0.4, "NSFW": "UNLIKELY", "width": 1000, "ok": True},
]


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        (("similarity>=0.3",), [1, 2, 6]), (("similarity > 0.3",), [2, 6]),
        (("similarity<0.3",), [0]), (("NSFW==UNLIKELY",), [0, 2, 3, 6]),
        (("NSFW!='UNLIKELY'",), [1]), (("width>=256",), [0, 1, 3, 6]),
        (("caption_length>=5",), [5, 6]), (("caption_length<=1",), [0, 1]),
        (("NSFW==UNLIKELY", "similarity>=0.3"), [2, 6]), (("ok==true",), [6]),
        (("caption_length>=3", "width>=256"), [3, 6]),
    ],
)  # fmt: skip
def test_filters_leave_what_passes_all_of_them(tmp_path, filters, left):
    shard_with_json(tmp_path / "s" / "0.tar", VALUES)
    plain = prepared(tmp_path / "s", tmp_path)
    done = prepared(tmp_path / "s", tmp_path, filters=filters)
    assert [ordinal for _, ordinal, _ in ordinals(done)] == left
    assert done.manifest.samples == len(left)
    assert done.manifest.sha256 != plain.manifest.sha256
    assert done.file != plain.file
    swapped = prepared(tmp_path / "s", tmp_path, filters=filters[::-1])
    assert swapped.manifest.sha256 == done.manifest.sha256


def test_what_a_filter_turned_away_is_said(tmp_path):
    shard_with_json(tmp_path / "s" / "0.tar", VALUES)
    done = prepared(tmp_path / "s", tmp_path, filters=("NSFW==UNLIKELY", "similarity>=0.3"))
    lines = [line for line in report(done.manifest) if line.startswith("filtered")]
    assert "NSFW==UNLIKELY (3 of 7 samples left out, 2 lack it)" in lines[0]
    assert "similarity>=0.3 (2 of 7 samples left out, 3 lack it)" in lines[0]


def test_a_kept_filtered_manifest_is_taken_while_its_base_is_the_same(tmp_path, monkeypatch):
    shard_with_json(tmp_path / "s" / "0.tar", VALUES)
    first = prepared(tmp_path / "s", tmp_path, filters=("width>=256",))
    from training.data import filters as conditions

    real = conditions.filtered
    monkeypatch.setattr(conditions, "filtered", None)
    assert prepared(tmp_path / "s", tmp_path, filters=("width>=256",)).file == first.file
    monkeypatch.setattr(conditions, "filtered", real)
    shard_with_json(tmp_path / "s" / "0.tar", VALUES * 2)
    again = prepared(tmp_path / "s", tmp_path, filters=("width>=256",), rebuild=True)
    assert again.manifest.samples == 2 * first.manifest.samples


def test_filters_take_the_parquet_columns_where_they_can(tmp_path, monkeypatch):
    import pandas

    write_shard(tmp_path / "s" / "00000.tar", [PAIR] * 4, ["3", "1", "x", "0"])
    (tmp_path / "s" / "00000.parquet").write_bytes(b"any")
    rows = pandas.DataFrame(
        {"key": ["0", "1", "2", "3"], "similarity": [0.1, 0.2, 0.3, 0.4], "status": "success"}
    )
    monkeypatch.setattr(pandas, "read_parquet", lambda file, columns: rows[columns])
    done = prepared(tmp_path / "s", tmp_path, filters=("similarity>=0.2",))
    assert [key for _, _, key in ordinals(done)] == ["3", "1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("similarity", "is no condition"), ("similarity=0.3", "is no condition"),
        (">=3", "is no condition"), ("NSFW>=UNLIKELY", "'UNLIKELY' is no number"),
        ("width>nan", "no finite number"), ("a>=", "is no condition"),
    ],
)  # fmt: skip
def test_conditions_that_mean_nothing_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        read_filter(text)


def test_a_field_that_no_sample_has_is_refused_with_those_there_are(tmp_path):
    shard_with_json(tmp_path / "s" / "0.tar", VALUES)
    with pytest.raises(UserError, match=r"no sample has a field 'similarty'.*known: similarity"):
        prepared(tmp_path / "s", tmp_path, filters=("similarty>=0.3",))
    with pytest.raises(UserError, match=r"leaves none of 7 samples"):
        prepared(tmp_path / "s", tmp_path, filters=("width>=5000",))


# --- the real engine ------------------------------------------------------------------------------

ROWS = {
    # In the order of the download list, which is not that of the tar; two were not fetched.
    "key": ["000000000", "000000001", "000000002", "000000003", "000000004", "000000005"],
    "status": ["success", "success", "failed_to_download", "success", "success", None],
    "similarity": [0.1, 0.3, 0.9, None, 0.5, 0.9],
    "NSFW": ["UNLIKELY", "NSFW", "UNLIKELY", None, "UNLIKELY", "UNLIKELY"],
    "width": [300, 256, None, 1000, 255, None],
    "ok": [True, False, None, True, True, None],
}
KEYS = ["000000003", "000000000", "000000004", "000000001"]


def shard_with_table(folder: Path, columns: dict = ROWS, **how: object) -> Path:
    """A shard of four fetched samples whose json lies, and the table that tells the truth."""
    import pandas

    samples = [{**PAIR, "json": b'{"similarity": 0.99, "width": 1}'} for _ in KEYS]
    write_shard(folder / "00000.tar", samples, KEYS)
    pandas.DataFrame(columns).to_parquet(folder / "00000.parquet", **how)
    return folder


@engine
@pytest.mark.parametrize(
    ("filters", "left"),
    [
        (("similarity>=0.3",), ["000000004", "000000001"]),
        (("similarity<0.3",), ["000000000"]),
        (("NSFW==UNLIKELY",), ["000000000", "000000004"]),
        (("NSFW!=UNLIKELY",), ["000000001"]),
        (("width>=256",), ["000000003", "000000000", "000000001"]),
        (("ok==true",), ["000000003", "000000000", "000000004"]),
        (("NSFW==UNLIKELY", "similarity>=0.3", "caption_length>=7"), ["000000004"]),
        (("status==success",), KEYS),
    ],
)
@pytest.mark.parametrize("compression", ["snappy", "zstd", None])
def test_columns_of_a_written_table_are_taken_before_the_json(tmp_path, filters, left, compression):
    folder = shard_with_table(tmp_path / "s", compression=compression)
    done = prepared(folder, tmp_path, filters=filters)
    assert [key for _, _, key in ordinals(done)] == left
    assert "parquet not checked" not in kinds(done.manifest)


@engine
def test_what_lacks_in_the_table_is_counted(tmp_path):
    done = prepared(shard_with_table(tmp_path / "s"), tmp_path, filters=("similarity>=0.3",))
    lines = [line for line in report(done.manifest) if line.startswith("filtered")]
    assert "similarity>=0.3 (2 of 4 samples left out, 1 lack it)" in lines[0]


@engine
def test_a_column_that_the_table_lacks_is_taken_from_the_json(tmp_path):
    folder = shard_with_table(tmp_path / "s", {k: ROWS[k] for k in ("key", "status")})
    done = prepared(folder, tmp_path, filters=("similarity>=0.9",))
    assert len(ordinals(done)) == 4


@engine
def test_a_table_with_a_key_twice_cannot_answer(tmp_path):
    doubled = {**ROWS, "key": ["000000000"] * 6}
    done = prepared(shard_with_table(tmp_path / "s", doubled), tmp_path, filters=("width<=1",))
    assert len(ordinals(done)) == 4


@engine
@pytest.mark.parametrize(
    ("status", "found"),
    [
        (["success"] * 4 + ["failed_to_download"] * 2, {}),
        (["success"] * 5 + ["failed_to_download"], {"parquet differs": ["00000.tar"]}),
        ([None] * 6, {"parquet differs": ["00000.tar"]}),
    ],
)
def test_a_written_table_is_compared_with_the_shard(tmp_path, status, found):
    folder = shard_with_table(tmp_path / "s", {**ROWS, "status": status})
    assert kinds(prepared(folder, tmp_path).manifest) == found


@engine
@pytest.mark.parametrize("content", [b"", b"no table", b"PAR1 and then nothing PAR1"])
def test_a_table_that_cannot_be_read_is_told_and_the_json_answers(tmp_path, content):
    folder = shard_with_table(tmp_path / "s")
    (folder / "00000.parquet").write_bytes(content)
    assert kinds(prepared(folder, tmp_path).manifest) == {"parquet differs": ["00000.tar"]}
    done = prepared(folder, tmp_path, filters=("similarity>=0.9",))
    assert len(ordinals(done)) == 4


@engine
def test_a_table_without_a_status_is_told(tmp_path):
    folder = shard_with_table(tmp_path / "s", {"key": ROWS["key"]})
    (finding,) = prepared(folder, tmp_path).manifest.findings
    assert finding.kind == "parquet differs"
    assert "\n" not in "".join(report(prepared(folder, tmp_path).manifest))


@engine
@pytest.mark.data
@pytest.mark.parametrize("text", ["width>=500", "original_height>=480"])
def test_real_tables_and_real_json_members_agree(shared_data, tmp_path, text, monkeypatch):
    pairs = shared_data / "pairs"
    by_table = prepared(pairs, tmp_path, file=tmp_path / "a.npz", filters=(text,))
    monkeypatch.setattr("training.data.filters._table", lambda *given: None)
    by_json = prepared(pairs, tmp_path, file=tmp_path / "b.npz", filters=(text,))
    assert ordinals(by_table) == ordinals(by_json)
    assert 0 < by_table.manifest.samples < 165
    assert "parquet not checked" not in kinds(by_table.manifest)


@engine
@pytest.mark.dist
def test_processes_read_the_tables_too(tmp_path):
    for number in range(9):
        shard_with_table(tmp_path / "s" / str(number))
    pattern = str(tmp_path / "s" / "*" / "00000.tar")
    done = prepared(pattern, tmp_path, filters=("similarity>=0.3",), processes=2)
    assert done.manifest.samples == 18
