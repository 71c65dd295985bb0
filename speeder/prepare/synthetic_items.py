"""Texts and pictures of the synthetic world's items: attributes decide their content, the rest is random."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

GROUPS = 6
_SIDE = 96

# One topic per group: the purpose of its things, and the things.
_TOPICS = {
    "tending a garden": "trowel, watering can, rake, flower pot, hedge shear, seed tray, wheelbarrow",
    "watching the stars": "telescope, star chart, eyepiece, planisphere, tripod, lunar filter, finder",
    "cooking at home": "saucepan, whisk, kettle, rolling pin, colander, frying pan, spice mill",
    "riding a bicycle": "saddle, handlebar, bicycle bell, pedal, chain lock, tyre pump, mudguard",
    "painting pictures": "paintbrush, easel, canvas, palette, watercolour set, sketchbook, varnish",
    "fishing in rivers": "fishing rod, reel, landing net, lure, tackle box, float, wader",
}
_ADJECTIVES = [
    "amber",
    "bold",
    "classic",
    "deluxe",
    "elegant",
    "favourite",
    "gentle",
    "handy",
    "ideal",
    "jolly",
    "keen",
    "light",
    "modern",
    "neat",
    "original",
    "plain",
    "quiet",
    "robust",
    "simple",
    "trusty",
]
_COLOURS = ["#d62728", "#2ca02c", "#1f77b4", "#f2c80f", "#8e44ad", "#111111"]


def write_descriptions(topics: np.ndarray, random: np.random.Generator) -> tuple[list[str], list[str]]:
    """Unique titles and texts of `(I,)` items; only the topic shows their group."""
    titles, texts = [], []
    used: set[str] = set()
    for topic in topics:
        purpose, things = list(_TOPICS.items())[topic]
        names = [f"{adjective} {thing}" for adjective in _ADJECTIVES for thing in things.split(", ")]
        name = names[random.integers(len(names))]
        title, edition = name.capitalize(), 2
        while title in used:
            title, edition = f"{name.capitalize()} {edition}", edition + 1
        used.add(title)
        titles.append(title)
        texts.append(f"{title}. Made for {purpose}.")
    return titles, texts


def draw_pictures(groups: np.ndarray, folder: Path, random: np.random.Generator) -> list[str]:
    """Writes `item-{i}.png` for `(I,)` items: shape and colour are the group's, the rest is random."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for item, group in enumerate(groups):
        grey = int(random.integers(200, 256))
        picture = Image.new("RGB", (_SIDE, _SIDE), (grey,) * 3)
        radius = random.uniform(0.25, 0.36) * _SIDE
        x, y = _SIDE / 2 + random.uniform(-0.1, 0.1, size=2) * _SIDE
        _draw_shape(ImageDraw.Draw(picture), int(group), x, y, radius, random.uniform(-0.3, 0.3))
        path = folder / f"item-{item}.png"
        picture.save(path)
        paths.append(str(path))
    return paths


def _draw_shape(
    draw: ImageDraw.ImageDraw, group: int, x: float, y: float, radius: float, turn: float
) -> None:
    """Disc, square, triangle, star, cross and ring, each in a colour of its own."""
    colour = _COLOURS[group]
    box = (x - radius, y - radius, x + radius, y + radius)
    if group == 0:
        draw.ellipse(box, fill=colour)
    elif group == 5:
        draw.ellipse(box, outline=colour, width=max(3, int(radius / 3)))
    elif group == 4:
        for angle in (turn, turn + math.pi / 2):
            ends = [(x + s * radius * math.cos(angle), y + s * radius * math.sin(angle)) for s in (-1, 1)]
            draw.line(ends, fill=colour, width=int(radius / 1.5))
    else:
        corners = {1: 4, 2: 3, 3: 10}[group]
        points = []
        for corner in range(corners):
            angle = turn - math.pi / 2 + 2 * math.pi * corner / corners
            reach = radius * (0.45 if group == 3 and corner % 2 else 1.0)
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        draw.polygon(points, fill=colour)
