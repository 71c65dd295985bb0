"""Film titles: articles moved to the front, and keys to match two lists of titles."""

import re
import unicodedata

_ARTICLES = (
    "the|a|an|la|le|les|l'|el|los|las|il|lo|gli|i|o|os|der|die|das|den|det|de|het|een|en|ett"
    "|un|une|una|uno|ein|eine"
)
_TRAILING_ARTICLE = re.compile(rf"^(?P<rest>.+), (?P<article>{_ARTICLES})$", re.IGNORECASE)
_LEADING_ARTICLE = re.compile(rf"^(?:{_ARTICLES.replace(chr(39), '')}) (?=\S)")
_YEAR = re.compile(r"^(?P<title>.*\S)\s*\((?P<year>\d{4})\)$")
_PARENTHESES = re.compile(r"\(([^()]*)\)")
_ALSO_KNOWN_AS = re.compile(r"^a\.?k\.?a\.? +", re.IGNORECASE)


def natural_title(title: str) -> str:
    """`"Usual Suspects, The"` -> `"The Usual Suspects"`, within parentheses too; without the year."""
    title = _PARENTHESES.sub(lambda match: f"({_article_first(match[1])})", title.strip())
    main, bracket, rest = title.partition(" (")
    return _article_first(main) + bracket + rest


def split_year(title: str) -> tuple[str, str | None]:
    """`"Toy Story (1995)"` -> `("Toy Story", "1995")`; None without a year in parentheses at the end."""
    match = _YEAR.match(title.strip())
    return (match["title"], match["year"]) if match else (title.strip(), None)


def title_keys(title: str) -> list[str]:
    """Normalised forms of a title (without its year) to match by, the most specific first.

    Case, accents, punctuation and articles do not count. The whole title comes first, then the part before the
    parentheses, then each name inside them.
    """
    main = _PARENTHESES.sub(" ", title)
    names = [_PARENTHESES.sub(" ", natural_title(main)), *_PARENTHESES.findall(title)]
    keys = [
        _key(natural_title(title)),
        *(_key(_article_first(_ALSO_KNOWN_AS.sub("", name))) for name in names),
    ]
    return list(dict.fromkeys(key for key in keys if key))


def _article_first(title: str) -> str:
    match = _TRAILING_ARTICLE.match(title.strip())
    if not match:
        return title.strip()
    space = "" if match["article"].endswith("'") else " "
    return match["article"] + space + match["rest"]


def _key(title: str) -> str:
    plain = unicodedata.normalize("NFKD", title.casefold().replace("&", " and "))
    letters = "".join(letter for letter in plain if not unicodedata.combining(letter))
    words = re.sub(r"[^\w]+", " ", re.sub(r"['\u2019`.]", "", letters)).strip()
    return _LEADING_ARTICLE.sub("", words)
