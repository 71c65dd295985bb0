"""CSV as Python's own `csv` reads it, row by row; and what is no CSV costs only its own line."""

import csv
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from speeder.cli.main import main
from speeder.data import PreparedData
from speeder.errors import SpeederError
from speeder.prepare.readers.lines import LineCount
from speeder.prepare.readers.tables import csv_rows, split_rows

SETTINGS = settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WIDTH = 3


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # pytest would keep thousands of records
    yield
    logging.disable(logging.NOTSET)


def rows_of(folder: Path, text: str, separator: str = ",") -> tuple[list[tuple[int, list]], LineCount]:
    """The rows of a text below a header of three columns, and the count."""
    path = folder / "x.csv"
    path.write_bytes((separator.join("abc") + "\n" + text).encode())
    count = LineCount(path)
    return list(csv_rows(path, count, [["a"], ["b"], ["c"]], WIDTH)), count


def python_rows(text: str, separator: str = ",", **options: object) -> list[list[str]]:
    # split at line feeds alone, as the readers of all formats do
    return list(csv.reader(io.StringIO(text, newline="\n"), delimiter=separator, **options))


@pytest.mark.parametrize(
    ("line", "cells"),
    [
        ('a,27" Monitor,x', ["a", '27" Monitor', "x"]),
        ('Joe "x,b,c', ['Joe "x', "b", "c"]),
        ('5\'11",6\'2",7"', ["5'11\"", "6'2\"", '7"']),
        ('a,"27"" Monitor",c', ["a", '27" Monitor', "c"]),
        ('a, "b",c', ["a", ' "b"', "c"]),
        ('a,"b"c,d', ["a", "bc", "d"]),
        ('"a",,""', ["a", "", ""]),
    ],
)
def test_quotes_within_a_line(line: str, cells: list[str], tmp_path: Path) -> None:
    for separator, end in ((",", "\n"), ("\t", "\r\n")):
        text = line.replace(",", separator) + end
        text += separator.join("xyz") + end
        rows, count = rows_of(tmp_path, text, separator)
        assert rows == [(2, cells), (3, ["x", "y", "z"])] and not count.dropped
        assert [row for _, row in rows] == python_rows(text, separator)
    path = tmp_path / "bare.csv"
    path.write_text(line + "\n")
    assert list(split_rows(path, LineCount(path), ",", 3, quoted=True)) == [(1, cells)]


def test_cells_run_over_lines_and_blank_lines(tmp_path: Path) -> None:
    text = '1,"One\r\n\r\n  \nstory",x\n\n2,two,"y\n"\n3,three,z'
    rows, count = rows_of(tmp_path, text)
    assert rows == [
        (2, ["1", "One\r\n\r\n  \nstory", "x"]),
        (7, ["2", "two", "y\n"]),
        (9, ["3", "three", "z"]),
    ]
    assert count.summary() == {"read": 4, "kept": 3, "dropped": {"blank": 1}}
    assert [row for _, row in rows] == [row for row in python_rows(text) if row]


def test_a_stray_quote_costs_its_own_line_only(tmp_path: Path) -> None:
    text = 'u1,"i1,1\nu2,i2,2\nu3,"i3",3\n\nu4,"i4,4\n'
    rows, count = rows_of(tmp_path, text)
    assert rows == [(3, ["u2", "i2", "2"]), (4, ["u3", "i3", "3"])]
    assert count.summary() == {"read": 5, "kept": 2, "dropped": {"quotes that do not match": 2, "blank": 1}}


def test_a_row_of_another_width_is_dropped_whole(tmp_path: Path) -> None:
    """Its second line would pass for a row."""
    rows, count = rows_of(tmp_path, '1,2,3,"x\ny",4,5\n6,7,8\n')
    assert rows == [(4, ["6", "7", "8"])] and count.dropped == {"wrong number of fields": 1}


def test_a_line_that_cannot_be_read_within_a_cell_costs_the_row(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'a,b,c\n1,"x\n\xff\ny",3\n4,5,6\n')
    count = LineCount(path)
    assert list(csv_rows(path, count, [["a"], ["b"], ["c"]], 3)) == [(5, ["4", "5", "6"])]
    assert count.dropped["not UTF-8"] == 1 and count.dropped["quotes that do not match"] == 1


def test_a_header_is_csv_too(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('"a","what, ""more""",b,"c\nd"\n1,2,3,4\n')
    count = LineCount(path)
    assert list(csv_rows(path, count, [["a"], ["b"], ["c\nd"]], 3)) == [(3, ["1", "3", "4"])]
    assert count.read == 1
    path.write_text('"a,b,c\n1,2,3\n')
    with pytest.raises(SpeederError, match=r"x\.csv line 1: the header has quotes that do not match"):
        list(csv_rows(path, LineCount(path), [["a"], ["b"], ["c"]], 3))


CELL = st.text(st.sampled_from('ab",\t\n\r é'), max_size=8)


@SETTINGS
@given(st.lists(st.lists(CELL, min_size=WIDTH, max_size=WIDTH), max_size=8), st.data())
def test_what_python_writes_is_read(tmp_path: Path, table: list[list[str]], data) -> None:
    separator = data.draw(st.sampled_from(",\t"))
    # with another end, this version of Python writes carriage returns without quotes, and does not read them again
    end, quoting = data.draw(st.sampled_from([("\r\n", csv.QUOTE_MINIMAL), ("\n", csv.QUOTE_ALL)]))
    out = io.StringIO()
    csv.writer(out, delimiter=separator, quoting=quoting, lineterminator=end).writerows(table)
    rows, count = rows_of(tmp_path, out.getvalue(), separator)
    assert said(rows) == [row for row in table if "".join(row).strip()]
    assert count.read == len(table)


@SETTINGS
@given(st.text(st.sampled_from('ab"",,\n\n'), max_size=60), st.sampled_from(",\t"))
def test_any_text_is_read_as_python_reads_it(tmp_path: Path, text: str, separator: str) -> None:
    """Where no quote is unmatched in a row of several lines, which would cost Python's reader the lines after it."""
    text = text.replace(",", separator)
    lines = io.StringIO(text, newline="\n").readlines()
    reader, expected, start = csv.reader(lines, delimiter=separator), [], 0
    for row in reader:
        record, start = lines[start : reader.line_num], reader.line_num
        if len(record) > 1 or not ends_outside_quotes(record[0], separator):
            assume(is_strict(record, separator))
        if len(row) == WIDTH:
            expected.append(row)
    rows, count = rows_of(tmp_path, text, separator)
    assert said(rows) == [row for row in expected if "".join(row).strip()]
    assert count.read - count.dropped.total() == len(rows)


def said(rows: list) -> list[list[str]]:
    """Rows without their numbers, and without those that say nothing: of tabs alone they count as blank lines."""
    return [row for _, row in rows if "".join(row).strip()]


def ends_outside_quotes(line: str, separator: str) -> bool:
    reader = csv.reader([line, ""], delimiter=separator)
    next(reader)
    return reader.line_num == 1


def is_strict(record: list[str], separator: str) -> bool:
    try:
        return len(list(csv.reader(record, delimiter=separator, strict=True))) == 1
    except csv.Error:
        return False


@SETTINGS
@given(
    st.binary(max_size=60).map(
        lambda some: some.translate(bytes(b'ab",\n\r\t\xff'[n % 8] for n in range(256)))
    )
)
def test_any_bytes_are_kept_or_counted(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b,c\n" + content)
    count = LineCount(path)
    rows = list(csv_rows(path, count, [["a"], ["b"], ["c"]], 3))
    assert count.read - count.dropped.total() == len(rows)
    numbers = [number for number, _ in rows]
    assert numbers == sorted(set(numbers))


def test_from_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "interactions.csv").write_text(
        'user,item,timestamp\nJoe "x,a,1\nJoe "x,b,2\n"Ann",a,3\nAnn,b,4\n'
    )
    (tmp_path / "items.csv").write_text('item,title\na,27" Monitor\nb,"A ""b"" c"\n')
    out = tmp_path / "out"
    without = ["--without", "text", "image", "collaborative"]
    assert main(["prepare", "plain", str(tmp_path), "--out", str(out), *without]) == 0
    data = PreparedData.load(out)
    assert data.catalogue.titles == ['27" Monitor', 'A "b" c']
    assert sorted(data.interactions.user_ids) == ["Ann", 'Joe "x'] and len(data.interactions) == 4


def test_separated_files_of_movielens_have_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::1::5::1\n1::2::5::2\n")
    (tmp_path / "movies.dat").write_text('1::"Heat::Drama\n2::"Alien" (1979)::War\n')
    out = tmp_path / "out"
    without = ["--without", "text", "image", "collaborative"]
    assert main(["prepare", "ml-1m", str(tmp_path), "--out", str(out), *without]) == 0
    assert PreparedData.load(out).catalogue.titles == ['"Heat', '"Alien" (1979)']
