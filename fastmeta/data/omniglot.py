"""Omniglot: 1,623 handwritten characters of 50 alphabets, drawn by 20 people each (Lake et al., 2015).

Read from ``images_background.zip`` and ``images_evaluation.zip`` as the authors publish them, or from the folders they unpack to.
"""

import io
import os
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from .cache import atomic_write, cache_dir, cached
from .episodes import LabelledImages

ARCHIVES = ("images_background", "images_evaluation")
ADDRESS = "https://github.com/brendenlake/omniglot/raw/master/python/"
CHARACTERS, DRAWINGS = 1623, 20


def load(root: str | Path | None = None) -> LabelledImages:
    """All 32,460 drawings, scaled from 105x105 to 28x28; classes in the order of their ids, ``Alphabet/characterNN``.

    ``root``: the folder that holds the two archives, or the two folders. None looks in ``FASTMETA_DATA``, its ``omniglot``,
    ``../shared/omniglot`` and where :func:`download` puts them. What was decoded is kept in the cache.
    Raises ``FileNotFoundError`` where there is none, ``ValueError`` where it is not all of Omniglot.
    """
    sources = [_source(find(root), name) for name in ARCHIVES]
    states = [source.stat() for source in sources]
    key = "-".join(f"{state.st_size:x}-{state.st_mtime_ns:x}" for state in states)
    arrays = cached(f"omniglot28-{key}", lambda: _decode(sources))
    return LabelledImages(torch.from_numpy(arrays["images"]).unsqueeze(1),
                          torch.arange(CHARACTERS).repeat_interleave(DRAWINGS), tuple(arrays["names"].tolist()))


def find(root: str | Path | None = None) -> Path:
    """The folder of the archives or of what they unpack to; see :func:`load`."""
    if root is not None:
        places = [Path(root)]
    else:
        data = os.environ.get("FASTMETA_DATA")
        places = [Path(data), Path(data) / "omniglot"] if data else []
        places += [Path("../shared/omniglot"), cache_dir() / "omniglot"]
    for place in places:
        if all(_source(place, name).exists() for name in ARCHIVES):
            return place
    raise FileNotFoundError(f"Omniglot: no {' and '.join(ARCHIVES)} (folder or .zip) in {', '.join(map(str, places))}; "
                            "name their folder with --data-root or FASTMETA_DATA, or get them with --download")


def download(root: str | Path | None = None, address: str = ADDRESS) -> Path:
    """Fetch the two archives (14 MB) into ``root`` (None: the cache) unless they are there; returns the folder.

    Raises ``ConnectionError`` when the address cannot be read, ``ValueError`` when what it sends is no archive.
    """
    root = Path(root) if root is not None else cache_dir() / "omniglot"
    for name in ARCHIVES:
        if _source(root, name).exists():
            continue
        url = f"{address.rstrip('/')}/{name}.zip"
        try:
            with atomic_write(root / f"{name}.zip") as file:
                with urllib.request.urlopen(url, timeout=60) as answer:
                    shutil.copyfileobj(answer, file)
                if not zipfile.is_zipfile(file):
                    raise ValueError(f"Omniglot: what {url} sent is not a zip archive")
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise ConnectionError(f"Omniglot: cannot download {url}: {error}") from error
    return root


def _source(root: Path, name: str) -> Path:
    return root / name if (root / name).is_dir() else root / f"{name}.zip"


def _drawings(source: Path) -> Iterator[tuple[str, bytes]]:
    """(character, PNG) of each drawing in the order of the class ids, which the file names begin with."""
    if source.is_dir():
        files = sorted(source.glob("*/*/*.png"), key=lambda file: file.name)
        yield from ((f"{file.parts[-3]}/{file.parts[-2]}", file.read_bytes()) for file in files)
    else:
        with zipfile.ZipFile(source) as archive:
            files = [name for name in archive.namelist() if name.count("/") == 3 and name.endswith(".png")]
            for name in sorted(files, key=lambda name: name.rsplit("/", 1)[1]):
                _, alphabet, character, _ = name.split("/")
                yield f"{alphabet}/{character}", archive.read(name)


def _decode(sources: list[Path]) -> dict[str, np.ndarray]:
    from PIL import Image
    images, names = [], []
    for source in sources:
        try:
            for character, png in _drawings(source):
                image = Image.open(io.BytesIO(png)).convert("L").resize((28, 28), Image.Resampling.BILINEAR)
                images.append(255 - np.asarray(image))  # the drawings are black on white; we want ink to be the signal
                names.append(character)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"Omniglot: cannot read {source}: {error}") from error
    classes = names[::DRAWINGS]
    if len(classes) != CHARACTERS or len(set(classes)) != CHARACTERS or names != [c for c in classes for _ in range(DRAWINGS)]:
        raise ValueError(f"Omniglot: {' and '.join(map(str, sources))} hold {len(names)} drawings of {len(set(names))} characters, "
                         f"not {DRAWINGS} of each of {CHARACTERS}")
    return {"images": np.stack(images), "names": np.array(classes)}
