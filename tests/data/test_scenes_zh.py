import hashlib
import re

import numpy as np
import pytest

from jaxgen import config
from jaxgen.data import scenes as s
from jaxgen.data.builder import Records, prepare
from jaxgen.data.config import DataConfig
from jaxgen.data.registry import recipe
from jaxgen.data.scenes_zh import TEMPLATES, WORDS
from jaxgen.errors import UserError
from jaxgen.evaluate.accuracy import judge
from jaxgen.evaluate.verifier import verify

SQUARE = s.Object("large", "blue", "square", 22, 16)
CIRCLE = s.Object("small", "red", "circle", 6, 16)


@pytest.mark.parametrize(
    ("scene", "said"),
    [
        (s.Scene("single", (CIRCLE,)), "一个小的红色圆形"),
        (s.Scene("single", (s.Object("large", "black", "ring"),)), "一个大的黑色圆环"),
        (s.Scene("relation", (CIRCLE, SQUARE), "left"), "一个小的红色圆形在一个大的蓝色正方形的左边"),
        (s.Scene("relation", (SQUARE, CIRCLE), "right"), "一个大的蓝色正方形在一个小的红色圆形的右边"),
        (s.Scene("relation", (CIRCLE, SQUARE), "above"), "一个小的红色圆形在一个大的蓝色正方形的上面"),
        (s.Scene("relation", (CIRCLE, SQUARE), "below"), "一个小的红色圆形在一个大的蓝色正方形的下面"),
        (s.Scene("count", (s.Object("large", "white", "cross"),) * 2), "两个大的白色十字形"),
        (s.Scene("count", (CIRCLE,) * 3), "三个小的红色圆形"),
        (s.Scene("count", (s.Object("small", "purple", "diamond"),) * 4), "四个小的紫色菱形"),
    ],
)
def test_canonical_captions(scene, said):
    assert s.caption(scene, "zh") == said


def test_every_word_means_one_thing_and_all_of_them_are_there():
    every = [word for words in WORDS.values() for word in words]
    assert len(set(every)) == len(every)
    assert set(WORDS) == {1, *s.NUMBERS, *s.SIZES, *s.COLOURS, *s.SHAPES, *s.RELATIONS, "stands"}
    assert all(len(words) >= 2 for words in WORDS.values())


def test_paraphrases_say_the_same_and_vary():
    """What a training caption says is read back by its words alone."""
    meaning = {word: thing for thing, words in WORDS.items() for word in words}
    word = re.compile("|".join(sorted(meaning, key=len, reverse=True)))
    frames, used = set(), set()
    for index in range(400):
        scene, captions = s.example("train", index, paraphrases=2, languages=("zh",))
        assert captions[0] == s.caption(scene, "zh")
        things = [[len(scene.objects) if scene.kind == "count" else 1, *o.description] for o in scene.objects]
        expected = things[0] if scene.relation is None else [*things[0], "stands", *things[1], scene.relation]
        for said in captions:
            frame = next(t for t in reversed(TEMPLATES) if re.fullmatch(t.replace("{}", "(.*)"), said))
            inner = re.fullmatch(frame.replace("{}", "(.*)"), said)[1]
            assert [meaning[w] for w in word.findall(inner)] == expected
            assert word.sub("", inner) in ("", "的")  # nothing but those words
            frames.add(frame)
            used |= set(word.findall(inner))
    assert frames == set(TEMPLATES)
    assert used == set(meaning)


def test_a_further_language_changes_no_scene_and_no_english_caption():
    for split in s.SPLITS[:5]:
        for index in range(20):
            scene, english = s.example(split, index)
            other, both = s.example(split, index, languages=("zh", "en"))
            assert other == scene
            assert both[: len(english)] == english
            assert both == s.example(split, index, languages=("en", "zh"))[1]
            assert len(both) == len(english) * (1 if split == "test_paraphrases" else 2)


def test_no_held_out_pair_is_named_in_training():
    for split in ("train", "test_zh"):
        for index in range(200):
            scene, captions = s.example(split, index, languages=("zh",))
            assert not {(o.colour, o.shape) for o in scene.objects} & s.UNSEEN_PAIRS
            assert not any(WORDS[c][0] + WORDS[shape][0] in said for said in captions for c, shape in s.UNSEEN_PAIRS)


def test_the_chinese_split_is_its_own_and_fit_to_be_judged():
    pairs = list(s.prompts("test_zh", 200))
    scenes = [scene for _, scene in pairs]
    assert all(said == s.caption(scene, "zh") for said, scene in pairs)
    assert verify(np.stack([s.render(scene) for scene in scenes]), scenes).exact.all()
    assert not set(scenes) & {scene for split in s.SPLITS[:5] for _, scene in s.prompts(split, 200)}
    kinds = [scene.kind for scene in scenes]
    assert all(abs(kinds.count(kind) / 200 - share) < 0.1 for kind, share in zip(s.KINDS, s.KIND_SHARES, strict=True))


class Renders:
    """Draws what the Chinese caption says, by looking it up."""

    def __init__(self, split):
        self.known = dict(s.prompts(split, 20, language="zh"))

    def sample(self, captions, seed):
        return np.stack([s.render(self.known[caption]) for caption in captions])


@pytest.mark.parametrize("split", ["test_zh", "validation"])
def test_any_split_is_judged_in_chinese(split):
    shares, _, captions, exact = judge(Renders(split), split, 20, language="zh")
    assert shares["eval/exact"] == 1.0
    assert exact.all()
    assert all(caption.startswith(("一个", "两个", "三个", "四个")) for caption in captions)


def test_what_is_prepared_is_named_by_the_languages():
    def named(*languages):
        _, made = recipe(DataConfig(train_examples=4, languages=languages))
        return made.identity(), "test_zh" in made.splits()

    assert named("en") == ("32px_4_1_0", False)  # as ever
    assert named("zh") == ("32px_4_1_0_zh", True)
    assert named("en", "zh") == named("zh", "en") == ("32px_4_1_0_en_zh", True)


def test_chinese_alone_is_prepared_and_read(tmp_path, monkeypatch):
    whole = s.example
    monkeypatch.setattr(s, "example", lambda split, index, *rest: whole(split, index % 8, *rest))  # quickly
    _, made = recipe(DataConfig(train_examples=8, languages=("zh",)))
    builder = prepare("scenes", made, tmp_path)
    records = Records(builder, "train")
    captions = [said for i in range(8) for said in records[i][1]]
    assert len(captions) == 16
    assert all(re.search("[一-龥]", said) and not re.search("[a-z]", said) for said in captions)
    judged = Records(builder, "test_zh")
    assert len(judged) == 1000
    _, captions, meta = judged[0]
    assert captions == [s.caption(s.Scene.from_json(meta), "zh")]


@pytest.mark.parametrize("languages", ["fr", "en,fr", ""])
def test_an_unknown_language_is_told_in_one_line(languages):
    with pytest.raises(UserError, match="choose from en, zh") as caught:
        config.load("configs/quickstart.py", [f"data.languages={languages}"])
    assert "\n" not in str(caught.value)


def test_the_set_has_not_moved():
    """A digest of scenes and captions: a change here makes every score before it another one."""
    digest = hashlib.sha256()
    for split in ("train", "validation", "test_zh"):
        for index in range(20):
            scene, captions = s.example(split, index, languages=("zh",))
            digest.update(repr((scene.to_json(), captions)).encode())
    assert digest.hexdigest()[:16] == "9a3a04a64108c910"
