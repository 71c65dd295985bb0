"""Titles as people write them, and the join of two lists by title and year."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speeder.data.titles import natural_title, split_year, title_keys
from speeder.errors import SpeederError
from speeder.prepare.posters import Poster, match_posters


@pytest.mark.parametrize(
    ("raw", "natural"),
    [
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Star Maker, The (Uomo delle stelle, L')", "The Star Maker (L'Uomo delle stelle)"),
        ("Double vie de Véronique, La (Double Life of Veronique, The)",
         "La Double vie de Véronique (The Double Life of Veronique)"),
        ("Cheap, Fast & Out of Control", "Cheap, Fast & Out of Control"),
        ("To Live (Huozhe)", "To Live (Huozhe)"),
        ("Die Hard", "Die Hard"),
        ("  Heat ", "Heat"),
    ],
)  # fmt: skip
def test_natural_titles(raw: str, natural: str) -> None:
    assert natural_title(raw) == natural
    assert natural_title(natural) == natural


def test_split_year() -> None:
    assert split_year("Toy Story (1995)") == ("Toy Story", "1995")
    assert split_year("Seven (Se7en) (1995)") == ("Seven (Se7en)", "1995")
    assert split_year("1984") == ("1984", None)


@given(st.text(max_size=20))
def test_keys_are_made_of_any_text_and_forget_case(text: str) -> None:
    assert all(key == key.strip() and key for key in title_keys(text))
    assert title_keys("Ab" + text) == title_keys("aB" + text)


def write_list(folder: Path, records: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "items.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )
    for record in records:
        if record.get("image"):
            (folder / record["image"]).write_bytes(b"not looked at here")
    return folder


def test_titles_match_across_spellings_but_not_years(tmp_path: Path) -> None:
    folder = write_list(
        tmp_path / "posters",
        [
            {"title": "Postino, Il (The Postman) (1994)", "image": "1.jpg", "plot": "A postman learns."},
            {
                "title": "Professional, The (a.k.a. Leon: The Professional) (1994)",
                "image": "2.jpg",
                "plot": "N/A",
            },
            {"title": "Oscar and Lucinda (a.k.a. Oscar & Lucinda) (1997)", "image": None, "plot": "Glass."},
            {"title": "Misérables, Les (1995)", "image": "4.jpg"},
            {"title": "Heat (1972)", "image": "5.jpg"},
            {"title": "Boys Life 2 (1997)", "image": "6.jpg"},
        ],
    )
    image = {n: str(folder / f"{n}.jpg") for n in range(1, 7)}
    expected = {
        "Il Postino (1994)": Poster(image[1], "A postman learns."),
        "The Postman (1994)": Poster(image[1], "A postman learns."),
        "Leon: The Professional (1994)": Poster(image[2], None),
        "The Professional (1994)": Poster(image[2], None),
        "Oscar & Lucinda (1997)": Poster(None, "Glass."),
        "Les Miserables (1995)": Poster(image[4], None),
        "LES MISÉRABLES (1995)": Poster(image[4], None),
        "Heat (1995)": None,
        "Boy's Life 2 (1997)": Poster(image[6], None),
        "unknown": None,
        "": None,
    }
    assert dict(zip(expected, match_posters(folder, list(expected)), strict=True)) == expected


def test_the_whole_title_wins_over_a_part(tmp_path: Path) -> None:
    records = [
        {"title": "Seven (Se7en) (1995)", "image": "a.jpg"},
        {"title": "Seven (1995)", "image": "b.jpg"},
    ]
    folder = write_list(tmp_path, records)
    found = match_posters(folder, ["Seven (1995)", "Seven (Se7en) (1995)", "Se7en (1995)"])
    assert [Path(poster.image).name for poster in found] == ["b.jpg", "a.jpg", "a.jpg"]


def test_pictures_named_by_id(tmp_path: Path) -> None:
    for name in ("7.png", "8.webp", "9.txt"):
        (tmp_path / name).write_bytes(b"")
    found = match_posters(tmp_path, ["", "", "", ""], ["7", "8", "9", f"../{tmp_path.name}/7"])
    assert found == [Poster(str(tmp_path / "7.png")), Poster(str(tmp_path / "8.webp")), None, None]


def test_any_ending_in_any_case(tmp_path: Path) -> None:
    names = ["i0.JPG", "i1.Png", "i2.gif", "i3.BMP", "i4.tiff", "i.5.jpeg", "i6.jfif", "i7.avif"]
    for name in [*names, "i8.heic", "i9.txt", "i9", "i9.pdf", "._i0.jpg"]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "i8.jpg").mkdir()
    ids = ["i0", "i1", "i2", "i3", "i4", "i.5", "i6", "i7", "i8", "i9", "I0", "", ".", "..", "nul\0byte"]
    found = match_posters(tmp_path, [""] * len(ids), ids)
    assert found == [Poster(str(tmp_path / name)) for name in names] + [None] * 7


def test_one_spelling_of_accents(tmp_path: Path) -> None:
    (tmp_path / "Ame\u0301lie.jpg").write_bytes(b"")  # as macOS writes it
    assert match_posters(tmp_path, [""], ["Am\u00e9lie"]) == [Poster(str(tmp_path / "Ame\u0301lie.jpg"))]


def test_of_several_pictures_of_an_item_the_taken_one_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "a.GIF", "a.JPG", "a.jpg", "b.bmp", "c.tif", "c.gif"):
        (tmp_path / name).write_bytes(b"")
    found = match_posters(tmp_path, [""] * 3, ["a", "b", "c"])
    assert [Path(poster.image).name for poster in found] == ["a.jpg", "b.bmp", "c.gif"]
    expected = "2 items have several pictures; of item 'a', a.jpg is taken and not a.JPG, a.png, a.GIF"
    assert expected in caplog.text


def test_an_id_longer_than_a_file_name_has_no_picture(tmp_path: Path) -> None:
    long = "\u732b" * 90  # 270 bytes in UTF-8, and a file name may have 255
    assert match_posters(tmp_path, [""], [long]) == [None]
    write_list(tmp_path, [{"title": "Heat (1995)"}])
    (tmp_path / "items.jsonl").write_text(json.dumps({"title": "Heat (1995)", "image": f"{long}.jpg"}))
    assert match_posters(tmp_path, ["Heat (1995)"]) == [Poster()]


def test_unreadable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpeederError, match="is not a folder of posters"):
        match_posters(tmp_path / "none", [])
    with pytest.raises(SpeederError, match=r"no items\.jsonl"):
        match_posters(tmp_path, ["Heat (1995)"])
    for line, message in [
        ("{", "line 1 is not an item"),
        ('{"image": "x"}', "line 1 is not an item"),
        ("[1]", "line 1 is not an item"),
        ('{"title": 3}', "line 1 is not an item"),
        ('{"title": "x", "image": "../y.jpg"}', "lies outside the folder"),
    ]:
        (tmp_path / "items.jsonl").write_text(line)
        with pytest.raises(SpeederError, match=message):
            match_posters(tmp_path, ["Heat (1995)"])
