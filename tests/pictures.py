"""Pictures that tests make up, as files' bytes."""

import io

from PIL import Image


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int] = (90, 128)) -> Image.Image:
    return Image.effect_noise(size, 90).convert("RGB")
