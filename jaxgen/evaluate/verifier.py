"""Whether a picture shows what a scene's caption asks for, exactly and by program alone.

Every patch of the picture that stands out of the background must be one object. Each is compared with all shapes and
sizes rendered at its place (to 1/8 pixel); its colour is the least-squares one. Objects may stand anywhere as long as the
relation holds. Tolerances are wide enough for the mild blur and colour error of a generator and refuse what an eye
refuses: half shapes, blobs, merged, missing, surplus and ghost objects."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from jaxgen.data.scenes import BACKGROUND, COLOURS, SHAPES, SIZES, Scene, coverage, extent, holds

# Levels (of 255) by which a pixel belongs to an object: above the bridges JPEG builds between close ones, below the
# least contrast of a colour (purple's 68) on a pixel two thirds covered.
BELONGS = 44
# Levels by which a pixel away from every object is seen: above noise of ±8 and ringing, so that ghosts still count.
STANDS_OUT = 26
# Pixels of a spot that an eye passes over, and of a faint one (JPEG leaves them at corners).
SPECK, FAINT_SPECK = 2, 6
# An object's colour is its nearest one if no channel is off by more: half the closest pair's distance (orange, yellow).
COLOUR_TOLERANCE = 35
# Squared error of the coverage, summed over an object's pixels, as a share of its area and with a constant for its
# edge; rendered scenes stay below a tenth of it, half shapes and blobs above.
MISFIT_SHARE, MISFIT_EDGE = 0.075, 0.8
AREA_RANGE = (0.6, 1.55)  # of a template's; what lies outside is not worth comparing
STEPS = 8  # sub-pixel offsets of the templates along each axis
RELATION_SLACK = 0.3  # pixels, for the error of a measured centre

_KINDS = tuple((size, shape) for size in SIZES for shape in SHAPES)
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Verdict:
    """bool [N] each: do the number, colours, shapes, sizes and the relation hold (true where there is none), and all of
    them together, object by object, with nothing else in the picture."""

    count: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    size: np.ndarray
    relation: np.ndarray
    exact: np.ndarray


@dataclass(frozen=True)
class Found:
    """One patch of a picture; None where it is like no colour or no shape."""

    colour: str | None
    shape: str | None
    size: str | None
    x: float
    y: float

    @property
    def description(self) -> tuple[str | None, str | None, str | None]:
        return self.size, self.colour, self.shape


def verify(images: np.ndarray, scenes: Sequence[Scene]) -> Verdict:
    """Judge uint8 [N, S, S, 3] pictures against N scenes."""
    if images.ndim != 4 or len(images) != len(scenes) or images.dtype != np.uint8:
        raise ValueError(f"want uint8 [N, S, S, 3] and N scenes, got {images.dtype} {images.shape} and {len(scenes)}")
    rows = [
        _judge(found, scene, images.shape[1])
        for start in range(0, len(images), 512)
        for found, scene in zip(find(images[start : start + 512]), scenes[start : start + 512], strict=True)
    ]
    return Verdict(*np.array(rows, bool).reshape(-1, 6).T)


def find(images: np.ndarray) -> list[list[Found]]:
    """The objects of each picture, uint8 [N, S, S, 3]."""
    n, size = len(images), images.shape[1]
    offset = images.astype(np.float32) - np.array(BACKGROUND, np.float32)
    contrast = np.abs(offset).max(-1)
    solid = (contrast > BELONGS).astype(np.uint8)
    templates, area, centroid = _templates(size)
    window = templates.shape[-1]
    padded = np.pad(offset, ((0, 0), (window, window), (window, window), (0, 0)))
    owners, patches, corners = [], [], []
    found: list[list[Found]] = [[] for _ in range(n)]
    for i in range(n):
        labels, label_map, stats, _ = cv2.connectedComponentsWithStats(solid[i], connectivity=8)
        for x, y in _ghosts(contrast[i], solid[i]):
            found[i].append(Found(None, None, None, x, y))
        for label in range(1, labels):
            left, top, width, height, pixels = stats[label]
            if pixels <= SPECK:
                continue
            # A patch is the component and its blurred edge; what belongs to a neighbour is taken out.
            x, y = int(left + width / 2) - window // 2, int(top + height / 2) - window // 2
            patch = padded[i, y + window : y + 2 * window, x + window : x + 2 * window]
            own = np.zeros((window, window), np.uint8)
            ys, xs = slice(max(y, 0), min(y + window, size)), slice(max(x, 0), min(x + window, size))
            own[ys.start - y : ys.stop - y, xs.start - x : xs.stop - x] = label_map[ys, xs] == label
            whole = width <= window - 2 and height <= window - 2
            patches.append(patch * cv2.dilate(own, _AROUND)[..., None] if whole else np.zeros_like(patch))
            owners.append(i)
            corners.append((x, y))
    if patches:
        for i, one in zip(owners, _identify(np.stack(patches), np.array(corners), templates, area, centroid), strict=True):
            found[i].append(one)
    return found


_AROUND = np.ones((3, 3), np.uint8)


def _ghosts(contrast: np.ndarray, solid: np.ndarray) -> list[tuple[float, float]]:
    """Centres of patches away from every object that an eye would still see; contrast and solid are [S, S]."""
    faint = (contrast > STANDS_OUT) & (cv2.dilate(solid, _AROUND) == 0)
    if np.count_nonzero(faint) <= SPECK:
        return []
    labels, _, stats, centres = cv2.connectedComponentsWithStats(faint.astype(np.uint8), connectivity=8)
    return [tuple(centres[k]) for k in range(1, labels) if stats[k, cv2.CC_STAT_AREA] > FAINT_SPECK]


@functools.cache
def _templates(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coverage [kind, STEPS, STEPS, W, W] of every kind with its centre at W // 2 + (step y, step x) / STEPS, its area
    [kind], and its centre of mass [kind, 2] relative to its centre."""
    reach = max(max(extent(shape, SIZES[s] * size)) for s, shape in _KINDS)
    window = 2 * math.ceil(reach + 2) + 1
    middle = window // 2
    stacks, area, centroid = [], [], []
    pixels = np.arange(window) + 0.5
    for s, shape in _KINDS:
        grid = np.stack(
            [
                np.stack(
                    [coverage(shape, SIZES[s] * size, middle + x / STEPS, middle + y / STEPS, window) for x in range(STEPS)]
                )
                for y in range(STEPS)
            ]
        )
        stacks.append(grid)
        mean = grid[0, 0]
        area.append(grid.sum((2, 3)).mean())
        centroid.append((mean.sum(0) @ pixels / mean.sum() - middle, mean.sum(1) @ pixels / mean.sum() - middle))
    return np.array(stacks, np.float32), np.array(area, np.float32), np.array(centroid, np.float32)


def _identify(
    patches: np.ndarray, corners: np.ndarray, templates: np.ndarray, area: np.ndarray, centroid: np.ndarray
) -> list[Found]:
    """patches float32 [M, W, W, 3] minus the background, their corners' (x, y) [M, 2] in the picture."""
    m, window = patches.shape[:2]
    flat = patches.reshape(m, -1, 3)
    # The colour: every pixel votes by its squared contrast, which edges hardly have.
    weight = np.square(flat).sum(-1)
    direction = (flat * weight[..., None]).sum(1)
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True) + 1e-6
    contrast = _PALETTE - np.array(BACKGROUND, np.float32)
    along = np.einsum("mpc,mc->mp", flat, direction)
    strength = np.sort(along, axis=1)[:, -6:].mean(1)  # of the object's fullest pixels
    distance = np.abs((direction * strength[:, None])[:, None] - contrast[None]).max(-1)
    # A thin shape may have no pixel that is wholly covered: compare directions first, then the strength that fits.
    cosine = direction @ (contrast / np.linalg.norm(contrast, axis=-1, keepdims=True)).T
    colour = np.where(cosine > 0.9, distance, np.inf).argmin(1)
    unit = contrast[colour]
    cover = np.einsum("mpc,mc->mp", flat, unit) / np.square(unit).sum(-1)[:, None]
    cover = cover.reshape(m, window, window)
    mass = np.maximum(cover.sum((1, 2)), 1e-3)
    pixels = np.arange(window, dtype=np.float32) + 0.5
    middle = np.stack([cover.sum(1) @ pixels, cover.sum(2) @ pixels], axis=-1) / mass[:, None]
    misfit = np.full((m, len(_KINDS)), np.inf, np.float32)
    centres = middle[:, None] - centroid[None]  # [M, kind, 2]
    for k in range(len(_KINDS)):
        rows = np.flatnonzero((mass > AREA_RANGE[0] * area[k]) & (mass < AREA_RANGE[1] * area[k]))
        if len(rows):
            misfit[rows, k] = _misfit(cover[rows], centres[rows, k], templates[k])
    best = misfit.argmin(1)
    least = misfit[np.arange(m), best]
    fits = least < MISFIT_SHARE * area[best] + MISFIT_EDGE
    out = []
    for i in range(m):
        x, y = centres[i, best[i]] + corners[i]
        size, shape = _KINDS[best[i]] if fits[i] else (None, None)
        right = _colour_error(flat[i], cover[i], contrast[colour[i]]) <= COLOUR_TOLERANCE
        out.append(Found(_NAMES[colour[i]] if right else None, shape, size, float(x), float(y)))
    return out


def _misfit(cover: np.ndarray, centres: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Squared coverage error [R] of one kind at the measured centres [R, 2] (x, y)."""
    window = cover.shape[-1]
    place = np.round((centres - window // 2) * STEPS).astype(int)
    whole, part = np.divmod(place, STEPS)
    near = np.abs(whole).max(-1) <= window // 4
    error = np.full(len(cover), np.inf, np.float32)
    for sx, sy in np.unique(whole[near], axis=0):
        rows = np.flatnonzero(near & (whole[:, 0] == sx) & (whole[:, 1] == sy))
        shifted = np.roll(grid[part[rows, 1], part[rows, 0]], (sy, sx), axis=(1, 2))
        error[rows] = np.square(cover[rows] - shifted).sum((1, 2))
    return error


def _colour_error(flat: np.ndarray, cover: np.ndarray, contrast: np.ndarray) -> float:
    """Levels by which the least-squares colour is off the palette's, in the worst channel."""
    a = np.clip(cover.reshape(-1), 0.0, 1.0)
    inner = a >= 0.75 * a.max()
    return float(np.abs((flat[inner].T @ a[inner]) / max(a[inner] @ a[inner], 1e-6) - contrast).max())


def _judge(found: list[Found], scene: Scene, size: int) -> tuple[bool, ...]:
    """(count, colour, shape, size, relation, exact) of one picture."""
    wanted = [o.description for o in scene.objects]
    # As sets, so that a wrong number of objects says nothing of their colours; of two it is the same, and more are alike.
    size_holds, colour_holds, shape_holds = ({f.description[k] for f in found} == {w[k] for w in wanted} for k in range(3))
    relation = True
    if scene.relation is not None:
        # Of the two ways to pair the objects found with those wanted, the one that agrees better.
        orders = [(found[0], found[1]), (found[1], found[0])] if len(found) == 2 else []
        agreement = [
            sum(a == b for f, w in zip(order, wanted, strict=True) for a, b in zip(f.description, w, strict=True))
            for order in orders
        ]
        relation = False
        if orders:
            a, b = orders[int(np.argmax(agreement))]
            relation = holds(scene.relation, (a.x, a.y), (b.x, b.y), size, RELATION_SLACK)
    whole = sorted(map(str, (f.description for f in found))) == sorted(map(str, wanted))
    return len(found) == len(wanted), colour_holds, shape_holds, size_holds, relation, whole and relation
