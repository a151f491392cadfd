"""Glyphs: a few-shot set that needs no download, the letters of the many scripts in matplotlib's bundled DejaVu fonts.

Each letter is drawn in several faces (sans, serif, mono, bold, oblique, where the face has it), each time under another small distortion.
"""

import unicodedata
from pathlib import Path

import numpy as np
import torch

from .cache import cached
from .episodes import LabelledImages, distort

DRAWING = 1  # to be counted up with any change of what is drawn, here or in distort(): caches of the old drawings are then left alone
INSTANCES = 20
FACES = ("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono")
LARGE, INK, SMALL = 56, 40, 28  # side of the drawing, of the box that a letter fills in it, and of the image: pixels
ALIKE = 0.97  # two letters whose blurred drawings have a cosine above this count as one: Latin, Greek and Cyrillic A, say
DISTORTION = 1.5


def load() -> LabelledImages:
    """About 1,260 letters, 20 images 28x28 of each; the same on every machine with the same matplotlib and Pillow. Kept in the cache."""
    import matplotlib  # here and not above: slow to import, and nothing else in the package needs it
    import PIL
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    arrays = cached(f"glyphs{DRAWING}-matplotlib{matplotlib.__version__}-pillow{PIL.__version__}", lambda: _draw(fonts))
    names = tuple(arrays["names"].tolist())
    return LabelledImages(torch.from_numpy(arrays["images"]), torch.arange(len(names)).repeat_interleave(INSTANCES), names)


def _draw(fonts: Path) -> dict[str, np.ndarray]:
    from matplotlib.ft2font import FT2Font
    from PIL import ImageFont
    files = [fonts / f"{face}.ttf" for face in FACES]
    maps = [FT2Font(str(file)).get_charmap() for file in files]
    faces = [ImageFont.truetype(str(file), 2 * INK) for file in files]  # drawn large, then scaled down

    # Letters only (no marks, which combine with others), and none that is another one with an accent.
    letters = [chr(code) for code in sorted(maps[0]) if unicodedata.category(chr(code)) in ("Lu", "Ll", "Lo")
               and not unicodedata.decomposition(chr(code))]
    kept, seen = [], torch.empty(0, (LARGE // 4) ** 2)
    for letter in letters:
        drawing = _letter(letter, faces[0])
        if drawing is None:
            continue
        coarse = torch.nn.functional.avg_pool2d(torch.from_numpy(drawing)[None], 8, 4, 2).flatten()
        coarse = coarse / coarse.norm()
        if len(seen) == 0 or (seen @ coarse).max() < ALIKE:
            kept.append(letter)
            seen = torch.cat([seen, coarse[None]])

    rng = np.random.default_rng(0)
    images = []
    for start in range(0, len(kept), 64):  # many letters a call: a call for each would mostly be overhead
        large = []
        for letter in kept[start:start + 64]:
            drawings = [_letter(letter, face) for face, charmap in zip(faces, maps) if ord(letter) in charmap]
            large += [drawings[i % len(drawings)] for i in range(INSTANCES)]  # every face as often as the others
        distorted = distort(torch.from_numpy(np.stack(large)).unsqueeze(1), rng, DISTORTION)
        small = torch.nn.functional.interpolate(distorted, (SMALL, SMALL), mode="bilinear", antialias=True)
        images.append((255 * small).round().to(torch.uint8))
    return {"images": torch.cat(images).numpy(), "names": np.array([unicodedata.name(letter, f"U+{ord(letter):04X}") for letter in kept])}


def _letter(letter: str, face) -> np.ndarray | None:
    """float32 ``[LARGE, LARGE]`` in [0, 1]: the ink scaled so that its longer side is INK, in the middle; None where there is no ink."""
    from PIL import Image, ImageDraw
    canvas = Image.new("L", (6 * INK, 6 * INK))
    ImageDraw.Draw(canvas).text((2 * INK, 2 * INK), letter, fill=255, font=face)
    box = canvas.getbbox()
    if box is None:
        return None
    ink = canvas.crop(box)
    factor = INK / max(ink.size)
    ink = ink.resize([max(1, round(side * factor)) for side in ink.size], Image.Resampling.BILINEAR)
    drawing = Image.new("L", (LARGE, LARGE))
    drawing.paste(ink, ((LARGE - ink.width) // 2, (LARGE - ink.height) // 2))
    return np.asarray(drawing, np.float32) / 255
