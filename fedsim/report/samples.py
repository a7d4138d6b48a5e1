"""The page of a run's samples: pictures and what its model says of them, in one file for any browser."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsim.report.page import STYLE
from fedsim.types import Sample

EDGE = 160  # pixels of the longer edge on the page


def page(step: int, samples: Sequence[Sample], *, public: bool) -> str:
    """Return the page.

    Args:
        step: completed updates.
        samples: at least one.
        public: whether the pictures are test data, and not training examples that were held out.
    """
    whose = (
        "of test data: as public as the scores on them"
        if public
        else "of training examples that were held out: not to be published"
    )
    title = f"Samples after {step} steps"
    rows = "".join(
        f"<tr><td>{_picture(sample.image)}</td><td>{html.escape(sample.said) or '-'}</td>"
        f"<td>{html.escape(sample.own) or '-'}</td></tr>"
        for sample in samples
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1><p>Pictures {whose}.</p>"
        '<div class="wide"><table><thead><tr><th>picture</th><th>the model says</th>'
        f"<th>caption it has</th></tr></thead><tbody>{rows}</tbody></table></div></body></html>\n"
    )


def _picture(image: NDArray[np.uint8]) -> str:
    """Return an image (H, W, 1 or 3) as an element, with its pixels in it."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(content, "PNG")
    high, wide = (round(EDGE * side / max(image.shape[:2])) for side in image.shape[:2])
    source = base64.b64encode(content.getvalue()).decode("ascii")
    return f'<img alt="" width="{wide}" height="{high}" src="data:image/png;base64,{source}">'
