"""Scenes: pictures of a few plain objects with captions that say exactly what is there, made by program.

Small enough to learn on a laptop, and exact: what a caption asks for can be checked in any picture (evaluate/verifier).
Example i of a split is a function of (seed, split, i) alone. Lengths are in pixels of an S x S picture, y points down."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxgen.data import scenes_zh
from jaxgen.data.config import LANGUAGES
from jaxgen.data.recipe import Example

BACKGROUND = (128, 128, 128)
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 200, 40),
    "purple": (150, 60, 180),
    "orange": (240, 130, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 1 / 8, "large": 0.21}  # radius as a share of S
RELATIONS = {"left": (1, 0), "right": (-1, 0), "above": (0, 1), "below": (0, -1)}  # where B lies, seen from A
KINDS = ("single", "relation", "count")
KIND_SHARES = (0.25, 0.5, 0.25)
# A split's place seeds its examples: new ones go at the end.
SPLITS = ("train", "validation", "test", "test_unseen_pairs", "test_paraphrases", "test_zh")
# Never drawn in training: each colour once, each shape at least once.
UNSEEN_PAIRS = frozenset(
    [
        ("red", "ring"),
        ("green", "cross"),
        ("blue", "diamond"),
        ("yellow", "triangle"),
        ("purple", "square"),
        ("orange", "circle"),
        ("white", "ring"),
        ("black", "diamond"),
    ]
)
SEEN_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in UNSEEN_PAIRS)
MARGIN, GAP = 1.0, 2.0  # of bounding boxes to the border and to each other
CLEAR = 1 / 64  # of S, by which a drawn relation is clearer than its definition asks: no caption hangs on a hair
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Object:
    """One object; x, y is its centre."""

    size: str
    colour: str
    shape: str
    x: float = 0.0
    y: float = 0.0

    @property
    def description(self) -> tuple[str, str, str]:
        return self.size, self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """kind "single", "relation" (the first object stands in `relation` to the second) or "count" (all alike)."""

    kind: str
    objects: tuple[Object, ...]
    relation: str | None = None

    def to_json(self) -> str:
        return json.dumps(self, default=vars)

    @staticmethod
    def from_json(text: str) -> "Scene":
        values = json.loads(text)
        return Scene(values["kind"], tuple(Object(**o) for o in values["objects"]), values["relation"])


def extent(shape: str, radius: float) -> tuple[float, float, float, float]:
    """How far a shape reaches left, right, up and down of its centre."""
    left, right, up, down = {
        "square": (0.86, 0.86, 0.86, 0.86),
        "triangle": (0.95, 0.95, 1.0, 0.8),
        "diamond": (1.1, 1.1, 1.1, 1.1),
    }.get(shape, (1.0, 1.0, 1.0, 1.0))
    return left * radius, right * radius, up * radius, down * radius


def inside(shape: str, radius: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """bool: which points at offsets (dx, dy) from the centre belong to the shape."""
    x, y = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return dx**2 + dy**2 <= radius**2
    if shape == "ring":
        squared = dx**2 + dy**2
        return (squared <= radius**2) & (squared >= (0.55 * radius) ** 2)
    if shape == "square":
        return np.maximum(x, y) <= 0.86 * radius
    if shape == "diamond":
        return x + y <= 1.1 * radius
    if shape == "cross":
        return ((x <= 0.33 * radius) & (y <= radius)) | ((y <= 0.33 * radius) & (x <= radius))
    # The triangle's sides run from (0, -r) to (±0.95 r, 0.8 r).
    return (dy <= 0.8 * radius) & (x <= 0.95 * (dy + radius) / 1.8)


def coverage(shape: str, radius: float, x: float, y: float, size: int) -> np.ndarray:
    """float64 [size, size]: the share of each pixel that the shape covers, by 4 x 4 samples."""
    points = (np.arange(size * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    mask = inside(shape, radius, (points - x)[None, :], (points - y)[:, None])
    return mask.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean((1, 3))


def render(scene: Scene, size: int = 32) -> np.ndarray:
    """uint8 [size, size, 3]. Positions in the scene are for this size."""
    image = np.empty((size, size, 3))
    image[:] = BACKGROUND
    for o in scene.objects:
        radius = SIZES[o.size] * size
        left, right, up, down = extent(o.shape, radius)
        x0, x1 = max(int(o.x - left) - 1, 0), min(int(o.x + right) + 2, size)
        y0, y1 = max(int(o.y - up) - 1, 0), min(int(o.y + down) + 2, size)
        box = max(x1 - x0, y1 - y0)
        mask = coverage(o.shape, radius, o.x - x0, o.y - y0, box)[: y1 - y0, : x1 - x0, None]
        image[y0:y1, x0:x1] += mask * (np.array(COLOURS[o.colour]) - image[y0:y1, x0:x1])
    return np.round(image).astype(np.uint8)


def holds(relation: str, a: tuple[float, float], b: tuple[float, float], size: float, slack: float = 0.0) -> bool:
    """Whether centre a stands in the relation to centre b; `slack` (pixels) forgives that much of the distance."""
    ux, uy = RELATIONS[relation]
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = dx * ux + dy * uy
    across = abs(dx * uy) + abs(dy * ux)
    return along >= 0.25 * size - slack and along > across - slack


def draw_scene(rng: np.random.Generator, split: str = "train", size: int = 32) -> Scene:
    """A random scene of a split: 25 / 50 / 25 single objects, relations, counts."""
    kind = KINDS[rng.choice(3, p=KIND_SHARES)]
    while True:  # some choices (two large diamonds) fit no picture: choose again
        scene = _place(rng, kind, _choose(rng, kind, split), size)
        if scene is not None:
            return scene


def _choose(rng: np.random.Generator, kind: str, split: str) -> list[tuple[str, str, str]]:
    """The descriptions (size, colour, shape) of a scene's objects."""

    def one(pairs: Sequence[tuple[str, str]]) -> tuple[str, str, str]:
        size = tuple(SIZES)[rng.integers(2)]
        return (size, *pairs[int(rng.integers(len(pairs)))])

    first = one(sorted(UNSEEN_PAIRS) if split == "test_unseen_pairs" else SEEN_PAIRS)
    if kind == "single":
        return [first]
    if kind == "relation":
        second = one(SEEN_PAIRS)
        while second == first:
            second = one(SEEN_PAIRS)
        return [first, second] if rng.integers(2) else [second, first]
    count = int(rng.integers(2, 5))
    return [first if count == 2 else ("small", *first[1:])] * count


def _place(rng: np.random.Generator, kind: str, descriptions: list[tuple[str, str, str]], size: int) -> Scene | None:
    """Positions by rejection; None where 200 tries fail."""
    extents = np.array([extent(shape, SIZES[s] * size) for s, _, shape in descriptions])
    low = MARGIN + extents[:, [0, 2]]
    high = size - MARGIN - extents[:, [1, 3]]
    relation = tuple(RELATIONS)[rng.integers(4)] if kind == "relation" else None
    n = len(descriptions)
    centres = rng.uniform(low, high, (200, n, 2))
    fits = np.ones(200, bool)
    for i in range(n):
        for j in range(i):
            apart = np.zeros(200, bool)
            for axis in (0, 1):
                a, b = centres[:, i, axis], centres[:, j, axis]
                before, after = 2 * axis, 2 * axis + 1
                apart |= (a - extents[i, before]) - (b + extents[j, after]) >= GAP
                apart |= (b - extents[j, before]) - (a + extents[i, after]) >= GAP
            fits &= apart
    for chosen in centres[fits]:
        points = [(float(x), float(y)) for x, y in chosen]
        if relation is None or holds(relation, points[0], points[1], size, slack=-CLEAR * size):
            objects = tuple(Object(*d, x=x, y=y) for d, (x, y) in zip(descriptions, points, strict=True))
            return Scene(kind, objects, relation)
    return None


# --- Words ------------------------------------------------------------------------------------------------------------

PLURALS = {s: "crosses" if s == "cross" else s + "s" for s in SHAPES}
NUMBERS = {2: "two", 3: "three", 4: "four"}
PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}

# word: (synonyms of training, the held-out synonym of test_paraphrases)
SYNONYMS: dict[str, tuple[tuple[str, ...], str]] = {
    "small": (("little", "tiny"), "mini"),
    "large": (("big", "huge"), "giant"),
    "red": (("crimson", "bright red"), "scarlet"),
    "green": (("grass-green", "emerald"), "leaf-green"),
    "blue": (("azure", "royal blue"), "cobalt blue"),
    "yellow": (("golden", "sunny yellow"), "lemon yellow"),
    "purple": (("violet", "deep purple"), "lilac"),
    "orange": (("bright orange", "amber"), "tangerine"),
    "white": (("snow-white", "ivory"), "chalk-white"),
    "black": (("jet-black", "pitch-black"), "coal-black"),
    "circle": (("disc", "dot"), "round spot"),
    "square": (("box", "block"), "tile"),
    "triangle": (("wedge", "three-sided shape"), "pyramid"),
    "diamond": (("rhombus", "lozenge"), "kite"),
    "cross": (("plus", "plus sign"), "plus symbol"),
    "ring": (("hoop", "annulus"), "donut"),
    "circles": (("discs", "dots"), "round spots"),
    "squares": (("boxes", "blocks"), "tiles"),
    "triangles": (("wedges", "three-sided shapes"), "pyramids"),
    "diamonds": (("rhombuses", "lozenges"), "kites"),
    "crosses": (("pluses", "plus signs"), "plus symbols"),
    "rings": (("hoops", "annuli"), "donuts"),
    "to the left of": (("left of", "on the left side of"), "on the left of"),
    "to the right of": (("right of", "on the right side of"), "on the right of"),
    "above": (("over", "higher than"), "on top of"),
    "below": (("under", "beneath"), "underneath"),
    "two": (("2", "a pair of"), "a couple of"),
    "three": (("3", "a group of three"), "a trio of"),
    "four": (("4", "a group of four"), "a set of four"),
}
TEMPLATES = ("{}", "a picture of {}", "an image showing {}", "there {be} {}", "{} on a grey background", "draw {}")
UNSEEN_TEMPLATE = "in this drawing we can see {}"


def _words(scene: Scene) -> list[str]:
    """The canonical caption's meaningful words, in order ("a" is put before each object of a single or relation)."""
    first = scene.objects[0]
    if scene.kind == "count":
        return [NUMBERS[len(scene.objects)], first.size, first.colour, PLURALS[first.shape]]
    words = list(first.description)
    if scene.relation is not None:
        words += [PHRASES[scene.relation], *scene.objects[1].description]
    return words


def _sentence(words: Sequence[str], kind: str) -> str:
    if kind == "count":
        return " ".join(words)
    objects = [" ".join(words[i : i + 3]) for i in range(0, len(words), 4)]
    named = [f"{'an' if o[0] in 'aeio' else 'a'} {o}" for o in objects]
    return named[0] if kind == "single" else f"{named[0]} {words[3]} {named[1]}"


def caption(scene: Scene, language: str = "en") -> str:
    """The canonical caption."""
    if language == "zh":
        return scenes_zh.caption(scene)
    return _sentence(_words(scene), scene.kind)


def parse(text: str) -> Scene | None:
    """The scene of a canonical caption, its centres unknown; None for any other sentence. For judging, never for drawing."""
    choice = lambda names: f"({'|'.join(names)})"  # noqa: E731
    one = f"an? {choice(SIZES)} {choice(COLOURS)} {choice(SHAPES)}"
    if match := re.fullmatch(f"{one}(?: {choice(PHRASES.values())} {one})?", text):
        a = Object(match[1], match[2], match[3])
        if match[4] is None:
            return Scene("single", (a,))
        relation = next(name for name, phrase in PHRASES.items() if phrase == match[4])
        return Scene("relation", (a, Object(match[5], match[6], match[7])), relation)
    if match := re.fullmatch(f"{choice(NUMBERS.values())} {choice(SIZES)} {choice(COLOURS)} {choice(PLURALS.values())}", text):
        count = next(n for n, name in NUMBERS.items() if name == match[1])
        shape = next(name for name, many in PLURALS.items() if many == match[4])
        return Scene("count", (Object(match[2], match[3], shape),) * count)
    return None


def paraphrase(scene: Scene, rng: np.random.Generator, split: str = "train", language: str = "en") -> str:
    """Another way to say it. For `test_paraphrases`: the held-out sentence with exactly one held-out synonym."""
    if language == "zh":
        return scenes_zh.paraphrase(scene, rng)
    words = _words(scene)
    if split == "test_paraphrases":
        swapped = int(rng.integers(len(words)))
        words[swapped] = SYNONYMS[words[swapped]][1]
        return UNSEEN_TEMPLATE.format(_sentence(words, scene.kind))
    words = [SYNONYMS[w][0][rng.integers(len(SYNONYMS[w][0]))] if rng.random() < 0.4 else w for w in words]
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    return template.format(_sentence(words, scene.kind), be="are" if scene.kind == "count" else "is")


# --- Examples ---------------------------------------------------------------------------------------------------------


def example(
    split: str, index: int, seed: int = 0, paraphrases: int = 1, size: int = 32, languages: Sequence[str] = ("en",)
) -> tuple[Scene, list[str]]:
    """Scene and captions of one example: in each language the canonical caption, in training then paraphrases.

    `test_paraphrases` has one caption, English; `test_zh` one, Chinese. The order of `languages` does not matter, and further
    ones change neither the scene nor its English captions."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = draw_scene(rng, split, size)
    if split == "test_paraphrases":
        return scene, [paraphrase(scene, rng, split)]
    if split == "test_zh":
        return scene, [caption(scene, "zh")]
    captions = []
    for language in LANGUAGES:
        if language in languages:
            captions.append(caption(scene, language))
            captions += [paraphrase(scene, rng, split, language) for _ in range(paraphrases if split == "train" else 0)]
    return scene, captions


def prompts(split: str, count: int, seed: int = 0, language: str = "en") -> Iterator[tuple[str, Scene]]:
    """(caption, scene) pairs to draw and judge."""
    for index in range(count):
        scene, captions = example(split, index, seed, languages=(language,))
        yield captions[0], scene


@dataclass(frozen=True)
class Scenes:
    """The recipe. A flip would break "left of", a crop "large" and the counts."""

    size: int = 32
    train_examples: int = 50_000
    paraphrases: int = 1
    seed: int = 0
    languages: tuple[str, ...] = ("en",)
    flip = False
    crop = False

    def identity(self) -> str:
        spoken = [language for language in LANGUAGES if language in self.languages]
        more = [] if spoken == ["en"] else spoken  # sets were prepared before there was a choice
        return "_".join([f"{self.size}px_{self.train_examples}_{self.paraphrases}_{self.seed}", *more])

    def splits(self) -> tuple[str, ...]:
        return SPLITS if "zh" in self.languages else tuple(split for split in SPLITS if split != "test_zh")

    def examples(self, split: str) -> Iterator[Example]:
        import cv2

        for index in range(self.train_examples if split == "train" else 1000):
            scene, captions = example(split, index, self.seed, self.paraphrases, self.size, self.languages)
            pixels = np.ascontiguousarray(render(scene, self.size)[:, :, ::-1])
            yield Example(str(index), cv2.imencode(".png", pixels)[1].tobytes(), captions, scene.to_json())
