"""The pictures of a demo run: a contact sheet of its episodes and a video.

They are rendered when the run is over, by setting a simulation of our own to the recorded snapshots: at a quality that
the real-time loop could not afford, and without taking a core from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_policy_ros.nodes.demo_report import Episode, Snapshot
from dit_policy_ros.sim.simulation import Simulation

Render = Callable[[Snapshot, str], np.ndarray]
"""(snapshot, camera) -> (H, W, 3) uint8 RGB; cameras: "overview" and the policy's own."""

Map = Callable[..., Iterable[Image.Image]]
"""`map`, or that of a pool of threads: results come in the order of the arguments."""

_INK = (32, 36, 42)
_FAINT = (128, 134, 142)
_PAPER = (250, 250, 248)
_GOOD = (30, 142, 70)
_BAD = (200, 44, 36)
_COLOURS = {"red": (219, 33, 31), "green": (26, 158, 64), "blue": (26, 82, 219)}

_COLUMNS = 4
_CELL = (400, 225)  # px, 16:9
_GAP = 14
_STRIP = 52
_HEADER = 66

_SCENE = (450, 800)  # px, height and width of the scene in the video
_BAR = 56  # px, the caption under the video
_HOLD_S = 0.8  # the last frame stays, with its verdict
_INSET = 0.27  # of the picture's height


@dataclass(frozen=True)
class Studio:
    """Renders snapshots, in any number of processes: OpenGL is not safe in several threads of one.

    `shadows` and `samples` are the overview's quality. Shadows take most of the time: on a CPU core a picture without
    them takes 20 ms, with 1024 and no antialiasing 0.1 s, with 2048 and 4 samples 0.4 s.
    """

    shadows: int
    samples: int

    def render(self, snapshot: Snapshot, camera: str) -> np.ndarray:
        """A picture of the snapshot, (H, W, 3) uint8: "overview" large and with shadows, else as the policy saw it."""
        simulation = _simulation(self if camera == "overview" else None)
        simulation.set_configuration(snapshot.joints, snapshot.blocks)
        return simulation.render(camera)


@cache
def _simulation(studio: Studio | None) -> Simulation:
    """This process's simulation for a studio's overview; None: for the policy's cameras."""
    if studio is None:
        return Simulation()
    simulation = Simulation(camera_size=_SCENE, pretty=True)
    quality = simulation.model.vis.quality
    quality.shadowsize, quality.offsamples = studio.shadows, studio.samples
    quality.numslices, quality.numstacks = 24, 12
    return simulation


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib brings DejaVu with it, so no font needs to be installed.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _colour_of(instruction: str) -> tuple[int, int, int]:
    return next((rgb for name, rgb in _COLOURS.items() if name in instruction.split()), _FAINT)


def _verdict(episode: Episode) -> tuple[str, tuple[int, int, int]]:
    return ("✓", _GOOD) if episode.success else ("✗", _BAD)


def contact_sheet(episodes: Sequence[Episode], render: Render, title: str, map_in_order: Map = map) -> Image.Image:
    """A picture of all episodes: each one's end, its start as an inset, the instruction, and whether it was done."""
    columns = max(2, min(_COLUMNS, len(episodes)))
    rows = -(-len(episodes) // columns)
    width = columns * (_CELL[0] + _GAP) + _GAP
    height = _HEADER + rows * (_CELL[1] + _STRIP + _GAP)
    sheet = Image.new("RGB", (width, height), _PAPER)
    ImageDraw.Draw(sheet).text((_GAP, _HEADER / 2), title, _INK, _font(24, bold=True), anchor="lm")
    for place, cell in enumerate(map_in_order(partial(_cell, render), episodes)):
        row, column = divmod(place, columns)
        left = _GAP + column * (_CELL[0] + _GAP)
        sheet.paste(cell, (left, _HEADER + row * (_CELL[1] + _STRIP + _GAP)))
    return sheet


def _cell(render: Render, episode: Episode) -> Image.Image:
    cell = Image.new("RGB", (_CELL[0], _CELL[1] + _STRIP), "white")
    draw = ImageDraw.Draw(cell)
    if episode.trace:
        cell.paste(_picture(render(episode.trace[-1], "overview"), _CELL), (0, 0))
        start = _table(render(episode.trace[0], "overview"))
        _paste_framed(cell, start, (8, 8))
        draw.text((14, 5 + start.height), "start", _INK, _font(11), anchor="ls")
    mark, colour = _verdict(episode)
    draw.rectangle((0, _CELL[1], 5, _CELL[1] + _STRIP), _colour_of(episode.instruction))
    draw.text((16, _CELL[1] + 16), episode.instruction, _INK, _font(14), anchor="lm")
    detail = f"{episode.outcome} · {episode.duration:.1f} s · seed {episode.seed}"
    draw.text((16, _CELL[1] + 37), detail, _FAINT, _font(12), anchor="lm")
    draw.text((_CELL[0] - 12, _CELL[1] + _STRIP / 2), mark, colour, _font(30, bold=True), anchor="rm")
    return cell


def _table(overview: np.ndarray) -> Image.Image:
    """The part of the overview where the blocks are, at 3/10 of a cell's size."""
    height, width = overview.shape[:2]
    part = overview[round(0.42 * height) : round(0.94 * height), round(0.26 * width) : round(0.78 * width)]
    return _picture(part, (_CELL[0] * 3 // 10, _CELL[1] * 3 // 10))


def _picture(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(image)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _paste_framed(page: Image.Image, picture: Image.Image, corner: tuple[int, int]) -> None:
    x, y = corner
    frame = (x - 2, y - 2, x + picture.width + 1, y + picture.height + 1)
    ImageDraw.Draw(page).rectangle(frame, "white")
    page.paste(picture, corner)


def video_frames(
    episode: Episode,
    render: Render,
    cameras: Sequence[str],
    fps: float,
    *,
    blank: bool = False,
    map_in_order: Map = map,
) -> Iterator[np.ndarray]:
    """The frames of one episode, (H, W, 3) uint8: the scene, what the policy's cameras saw, and the instruction.

    `blank` draws the policy's cameras black, as it saw them in that control. The last frame stays for 0.8 s.
    """
    pages = map_in_order(partial(_page, episode, render, cameras, blank), range(len(episode.trace)))
    for number, page in enumerate(pages):
        last = number == len(episode.trace) - 1
        yield from [np.asarray(page)] * (max(1, round(_HOLD_S * fps)) if last else 1)


def _page(episode: Episode, render: Render, cameras: Sequence[str], blank: bool, number: int) -> Image.Image:
    snapshot = episode.trace[number]
    scene = Image.fromarray(render(snapshot, "overview"))
    page = Image.new("RGB", (scene.width, scene.height + _BAR), _PAPER)
    page.paste(scene, (0, 0))
    _draw_insets(page, scene.height, [(camera, render(snapshot, camera)) for camera in cameras], blank)
    _draw_caption(page, scene.height, episode, snapshot.time, number == len(episode.trace) - 1)
    return page


def _draw_insets(page: Image.Image, height: int, views: Sequence[tuple[str, np.ndarray]], blank: bool) -> None:
    side = round(_INSET * height)
    draw = ImageDraw.Draw(page)
    for place, (camera, view) in enumerate(views):
        corner = (page.width - side - 12, 12 + place * (side + 12))
        _paste_framed(page, _picture(np.zeros_like(view) if blank else view, (side, side)), corner)
        label = (corner[0] + 6, corner[1] + side - 6)
        draw.text(label, camera, "white", _font(13), anchor="ls", stroke_width=2, stroke_fill=_INK)


def _draw_caption(page: Image.Image, top: int, episode: Episode, seconds: float, last: bool) -> None:
    draw = ImageDraw.Draw(page)
    middle = top + _BAR / 2
    draw.ellipse((18, middle - 10, 38, middle + 10), _colour_of(episode.instruction))
    draw.text((52, middle), f"“{episode.instruction}”", _INK, _font(19, bold=True), anchor="lm")
    right = page.width - 18
    if last:
        mark, colour = _verdict(episode)
        draw.text((right, middle), f"{episode.outcome} {mark}", colour, _font(17, bold=True), anchor="rm")
    else:
        clock = f"episode {episode.number} · {seconds:4.1f} s"
        draw.text((right, middle), clock, _FAINT, _font(15), anchor="rm")


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """H.264 in MP4, playable while it downloads. Frames (H, W, 3) uint8 with even sides; returns how many were written.

    Raises ValueError when there is no frame.
    """
    count = 0
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast"}
        for image in frames:
            stream.height, stream.width = image.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            count += 1
        if not count:
            raise ValueError(f"{path}: no frame to write")
        container.mux(stream.encode())
    return count
