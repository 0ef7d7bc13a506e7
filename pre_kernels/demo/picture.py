"""A scene as a picture, with the question and its answer."""

from __future__ import annotations

import base64
import io

from pre_kernels.diagnostics.report.plots import COLOURS

from .scenes import DIGIT, MIDDLE, SIDE, compose, split_digits

# A pixel of a digit is shown as a square of this many pixels.
SCALE = 8


def scene() -> dict[str, str]:
    """Return the first test scene of seed 0 as {"picture": PNG in base64, "caption": text}."""
    from PIL import Image, ImageDraw

    shown = compose(split_digits(0)[2], 1, 0)
    pixels = (shown.images[0, 0] * 255).round().byte().numpy()
    picture = Image.fromarray(pixels)
    size = (SCALE * picture.width, SCALE * picture.height)
    picture = picture.resize(size, Image.Resampling.NEAREST).convert("RGB")
    # The digits touch each other. Lines that are not in the scene show where one ends.
    lines = ImageDraw.Draw(picture)
    for place in range(SCALE * DIGIT, SCALE * SIDE, SCALE * DIGIT):
        lines.line((place, 0, place, size[1]), COLOURS[0], 2)
        lines.line((0, place, size[0], place), COLOURS[0], 2)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    digit = int(shown.digits[0, MIDDLE])
    answer = "yes" if digit % 2 else "no"
    return {
        "picture": base64.b64encode(file.getvalue()).decode(),
        "caption": "A scene of nine digits. The task: “Is the digit in the middle odd?” "
        f"It is a {digit}: {answer}. The probe asks more: which digit is at each place?",
    }
