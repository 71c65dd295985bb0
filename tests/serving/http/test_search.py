"""Titles are found by the beginnings of their words, whatever the case, the accents and the articles."""

import pytest

from speeder.data.catalogue import ItemCatalogue
from speeder.serving.http.search import TitleIndex, words
from tests.serving.http.worlds import MARKUP, TITLES, ids


@pytest.fixture(scope="module")
def index():
    return TitleIndex(ItemCatalogue(ids(), TITLES))


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("toy story", ["Toy Story (1995)"]),
        ("STOR to", ["Toy Story (1995)"]),
        ("star", ["Star Wars (1977)", "Star Trek: First Contact (1996)"]),
        ("star trek", ["Star Trek: First Contact (1996)"]),
        ("the usual suspects", ["Usual Suspects, The (1995)"]),
        ("usual suspects", ["Usual Suspects, The (1995)"]),
        ("amelie", ["Amélie (2001)"]),
        ("AMÉLIE", ["Amélie (2001)"]),
        ("pythons life", ["Monty Python's Life of Brian (1979)"]),
        ("python\u2019s", ["Monty Python's Life of Brian (1979)"]),
        ("2001", ["2001: A Space Odyssey (1968)", "Amélie (2001)"]),
        ("miserables 2012", ["Les Misérables (2012)"]),
        ("alien", ["Alien (1979)", "Aliens (1986)"]),
        ("bold", [MARKUP]),
        ("m", ["M (1931)", "Monty Python's Life of Brian (1979)", "Les Misérables (1998)", "Les Misérables (2012)",
               "A Very Long Title That Goes On and On, Whatever the Width of the Screen May Be, Until Nobody Reads It"
               " (1999)"]),
        ("oy", []),
        ("nothing of the kind", []),
        ("  ", []),
        ("!?", []),
    ],
)  # fmt: skip
def test_search(index, query, found):
    assert [TITLES[row] for row in index.search(query, limit=9)] == found


def test_an_id_is_found_and_comes_first(index):
    assert index.search("i8", 5) == [8]  # it has no title
    assert index.search("a/b?c=1 d", 5)[0] == 4


def test_a_search_is_bounded_however_common_its_words_are(monkeypatch):
    """Many titles, each with every common word; the rare word decides what is looked at, wherever it stands."""
    titles = [f"A All And Any {n:05d} As At" for n in range(3000)] + ["A Rare One At All"]
    index = TitleIndex(ItemCatalogue([f"i{n}" for n in range(len(titles))], titles))
    looked, has = [], TitleIndex._has
    monkeypatch.setattr(
        TitleIndex, "_has", lambda self, row, asked: looked.append(row) or has(self, row, asked)
    )
    assert index.search("a all at rare", 5) == [3000] and looked == [3000]
    looked.clear()
    monkeypatch.setattr("speeder.serving.http.search.MOST_ITEMS", 100)
    assert len(index.search(" ".join(["a"] * 400), 5)) == 5 and len(looked) == 100


def test_no_more_than_the_limit(index):
    assert len(index.search("1", 3)) == 3
    assert index.search("1", 3) == index.search("1", 30)[:3]


@pytest.mark.parametrize(
    ("title", "rows"),
    [
        ("Star Wars", [1]),
        ("star wars (1977)", [1]),
        ("The Usual Suspects (1995)", [3]),
        ("Les Misérables", [5, 6]),
        ("Les Miserables (2012)", [6]),
        ("Alien", [16]),
        ("Braveh", [12]),
        ("Star", [1, 2]),
        ("Toy Story (1996)", []),
    ],
)
def test_a_title_means_the_items_that_have_it_or_else_what_it_finds(index, title, rows):
    assert sorted(index.resolve(title)) == rows


def test_words_are_letters_and_digits_alone():
    assert words("L'Été,  à-la <b>Ville</b>!") == ["lete", "a", "la", "b", "ville", "b"]
