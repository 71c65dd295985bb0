"""The report's parts alone: which users and items stand for all, pictures within their room, durations."""

import base64
import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from speeder.studies.report.items import item_groups
from speeder.studies.report.summary import duration
from speeder.studies.report.thumbnails import Thumbnails
from speeder.studies.report.users import choose_users

# the machine may be busy with other tests
CALM = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@CALM
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 12))
def test_chosen_users_are_spread_over_the_lengths(lengths, count):
    rows = choose_users(lengths, count)
    assert len(rows) == len(set(rows)) == min(count, len(lengths))
    chosen = [lengths[row] for row in rows]
    assert chosen == sorted(chosen)
    if len(rows) > 1:  # one of each part of the sorted lengths
        ordered = sorted(lengths)
        for part, length in enumerate(chosen):
            start, end = part * len(lengths) // len(rows), -(-(part + 1) * len(lengths) // len(rows))
            assert ordered[start] <= length <= ordered[end - 1]


@CALM
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.data())
def test_every_item_is_in_one_group(counts, data):
    counts = np.array(counts)
    known = data.draw(st.integers(0, len(counts)))
    groups = item_groups(counts, known, "added")
    assert (np.sum(list(groups.values()), axis=0) == 1).all()
    new = groups.get("added", np.zeros(len(counts), dtype=bool))
    assert (new == (np.arange(len(counts)) >= known)).all()
    never = groups.get("never in training", np.zeros(len(counts), dtype=bool))
    assert (never == ((counts == 0) & ~new)).all()
    ranges = [
        (counts[member].min(), counts[member].max()) for label, member in groups.items() if "times" in label
    ]
    assert all(before[1] < after[0] for before, after in pairwise(ranges))


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    paths = []
    for number in range(4):
        noise = random.integers(0, 256, (900, 600, 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(noise).save(paths[-1])
    return paths


def test_pictures_are_small_and_made_once(pictures):
    thumbnails = Thumbnails()
    first = thumbnails.address(pictures[0])
    picture = Image.open(io.BytesIO(base64.b64decode(first.partition(",")[2])))
    assert first.startswith("data:image/jpeg;base64,") and picture.size == (184, 276)
    assert thumbnails.address(pictures[0]) is first and thumbnails.used == 2 * len(first)
    assert thumbnails.address(None) is None


def test_pictures_stay_within_their_room(pictures):
    one = len(Thumbnails().address(pictures[0]))
    thumbnails = Thumbnails(budget=int(2.5 * one))
    made = [thumbnails.address(path) for path in pictures]
    assert [address is not None for address in made] == [True, True, False, False]
    assert thumbnails.used <= thumbnails.budget and thumbnails.left_out == 2


def test_what_is_no_picture_is_told_and_not_shown(tmp_path, pictures):
    text = tmp_path / "secret.jpg"
    text.write_text("not a picture")
    whole = Path(pictures[1]).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    vector = tmp_path / "drawing.svg"
    vector.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    thumbnails = Thumbnails()
    paths = [str(text), str(tmp_path / "half.png"), str(vector), str(tmp_path / "none.png"), "\0"]
    assert [thumbnails.address(path) for path in paths] == [None] * len(paths)
    assert list(thumbnails.broken) == paths and all(thumbnails.broken.values())


def test_upright_and_without_what_the_camera_noted(tmp_path):
    picture, exif = Image.new("RGB", (40, 20), "red"), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where it was taken"  # turned by a quarter; a description
    picture.save(tmp_path / "turned.jpg", exif=exif)
    address = Thumbnails().address(str(tmp_path / "turned.jpg"))
    shown = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert shown.size == (20, 40) and not dict(shown.getexif())


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "unknown"), (0.52, "0.5 s"), (59.4, "59.4 s"), (61, "1 min 1 s"), (3725, "1 h 2 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_damaged_exif_data_end_no_report(tmp_path: Path, damaged_exif: bytes) -> None:
    Image.new("RGB", (20, 30), "red").save(tmp_path / "x.jpg", exif=damaged_exif)
    thumbnails = Thumbnails()
    assert thumbnails.address(str(tmp_path / "x.jpg")).startswith("data:image/jpeg") and not thumbnails.broken
