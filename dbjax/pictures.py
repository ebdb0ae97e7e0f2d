"""Pictures of samples."""

from collections.abc import Sequence

from etils import epath
import numpy as np
from PIL import Image
from PIL import ImageDraw


def grid(images: np.ndarray, labels: np.ndarray | Sequence[str] | None = None, columns: int = 10
         ) -> Image.Image:
  """A picture of images (N, H, W, C) uint8, row by row, each under its label (N,).

  Of images that are neither grey nor coloured it shows the first three channels, or the first.
  """
  images = images[..., :3 if images.shape[-1] > 2 else 1]
  scale = max(1, 48 // images.shape[1])
  height, width = images.shape[1] * scale, images.shape[2] * scale
  caption, gap = (12, 2) if labels is not None else (0, 2)
  rows = -(-len(images) // columns)
  canvas = Image.new("RGB", (columns * (width + gap), rows * (height + caption + gap)), "white")
  draw = ImageDraw.Draw(canvas)
  for i, image in enumerate(images):
    x, y = i % columns * (width + gap), i // columns * (height + caption + gap)
    picture = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)).astype(np.uint8))
    canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y + caption))
    if labels is not None:
      draw.text((x + width // 2, y), str(labels[i]), fill="black", anchor="ma")
  return canvas


def save_grid(path: epath.PathLike, images: np.ndarray, labels: np.ndarray | Sequence[str] | None,
              columns: int) -> epath.Path:
  """Writes `grid` as PNG, and returns the path."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("wb") as f:
    grid(images, labels, columns).save(f, format="PNG")
  return path


def curves(signals: np.ndarray, height: int = 48) -> np.ndarray:
  """Images (N, height, length - 1, 1) uint8 of signals (N, length): black lines on white."""
  top = np.abs(signals).max() or 1.0
  level = np.linspace(top, -top, height)[:, None]
  ends = np.stack([signals[:, None, :-1], signals[:, None, 1:]])  # of each stroke
  ink = (ends.min(0) - top / height <= level) & (level <= ends.max(0) + top / height)
  return np.where(ink, 0, 255)[..., None].astype(np.uint8)
