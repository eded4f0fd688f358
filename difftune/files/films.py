"""Films as .mp4, by OpenCV."""

import tempfile
from importlib import util
from pathlib import Path

from torch import Tensor

from difftune.errors import UserError

FPS = 16  # Wan's


def check_films() -> None:
    """UserError if no film can be written here."""
    if util.find_spec("cv2") is None:
        raise UserError("a film is written by OpenCV: pip install opencv-python-headless, or leave --num_frames out")


def stills(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) as they are, and of films (B, 3, F, H, W) the frames in their middle."""
    return images if images.ndim == 4 else images[:, :, images.shape[2] // 2]


def mp4(film: Tensor, fps: int = FPS) -> bytes:
    """A film (3, F, H, W) in [0, 1] as MPEG-4. UserError if OpenCV is missing or cannot write it."""
    check_films()
    import cv2

    frames = (film.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).flip(3).contiguous().cpu().numpy()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "film.mp4")
        writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), fps, frames.shape[2:0:-1])
        for frame in frames:
            writer.write(frame)
        writer.release()
        if not file.is_file() or not file.stat().st_size:
            raise UserError(f"OpenCV cannot write a film of {tuple(film.shape)}: give an even width and height")
        return file.read_bytes()
