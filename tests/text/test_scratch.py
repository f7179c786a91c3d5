import json
import sys

import numpy as np
import pytest

from jaxgen.data import scenes
from jaxgen.errors import UserError
from jaxgen.text import check_prompts, load_text_encoder, save_text_encoder, scratch

TINY = {"hidden_size": 32, "layers": 2, "heads": 2, "max_length": 48}
ZH = [said for said, _ in scenes.prompts("test_zh", 1000)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    target = tmp_path_factory.mktemp("scratch") / "encoder"
    scratch.write(target, scratch.scene_captions(("en", "zh")), **TINY)
    return target


@pytest.fixture(scope="module")
def encoder(directory):
    return load_text_encoder(str(directory))


def test_an_ordinary_directory_is_written_and_read(directory, encoder, tmp_path):
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in directory.iterdir()) == names
    assert encoder.hidden_size == encoder.pooled_size == 32
    assert encoder.max_length == 48
    text = encoder([*ZH[:3], "a small red circle"])
    assert np.isfinite(text.hidden).all()
    assert len(np.unique(np.round(np.asarray(text.pooled), 5), axis=0)) == 4  # untrained, and yet it tells them apart
    save_text_encoder(encoder, tmp_path / "copy")
    np.testing.assert_array_equal(load_text_encoder(str(tmp_path / "copy"))([ZH[0]]).hidden, encoder([ZH[0]]).hidden)


def test_transformers_reads_the_tokenizer_alike(directory, encoder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    assert theirs(ZH[:50]).input_ids == encoder.tokenizer.encode(ZH[:50], 48)
    assert (theirs.pad_token, theirs.unk_token, theirs.cls_token, theirs.sep_token, theirs.mask_token) == (
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    )


def test_every_canonical_caption_is_known_and_read_back(encoder):
    english = [said for said, _ in scenes.prompts("test", 300)]
    words = encoder.tokenizer
    assert all(words.unknown_fraction(said) == 0 for said in [*ZH, *english])
    rows = words.encode([*ZH, *english], 48)
    for said, row in zip([*ZH, *english], rows, strict=True):
        assert row[0] == 2  # [CLS]
        assert row[-1] == words.end == 3
        back = words.decode(row)
        assert back.replace(" ", "") == said.replace(" ", "")
        assert words.encode([back], 48) == [row]
    assert max(map(len, rows)) <= 48
    assert len(words.encode(["一个小的红色圆形"], 48)[0]) == 2 + 8  # a character is a token


def test_other_english_words_are_spelled_and_other_characters_are_not_known(encoder):
    said = [captions[0] for _, captions in (scenes.example("test_paraphrases", i) for i in range(100))]
    assert all(encoder.tokenizer.unknown_fraction(caption) == 0 for caption in said)
    assert encoder.tokenizer.unknown_fraction("猫狗") == 1


def test_chinese_prompts_are_accepted(encoder):
    assert check_prompts(encoder, ["一个小的红色圆形在一个大的蓝色正方形的左边", *ZH[:20], "画三个小的红色圆形"]) == []
    with pytest.raises(UserError, match="does not know 100%"):
        check_prompts(encoder, ["两只猫坐在椅子旁吃鱼"[3:4]])


def test_the_same_call_writes_the_same_files_and_another_seed_other_weights(directory, tmp_path):
    captions = scratch.scene_captions(("en", "zh"))
    scratch.write(tmp_path / "same", captions, **TINY)
    scratch.write(tmp_path / "other", captions, seed=1, **TINY)
    for file in directory.iterdir():
        assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes()
        assert ((tmp_path / "other" / file.name).read_bytes() == file.read_bytes()) == (file.name != "model.safetensors")


def test_the_commonest_words_take_what_room_there_is(tmp_path):
    captions = ["red dog", "red cat", "red dog 猫"]
    everything = scratch.make_tokenizer(captions, 500)
    less = scratch.make_tokenizer(captions, everything.get_vocab_size() - 1)
    assert everything.encode("red dog cat 猫").tokens == ["[CLS]", "red", "dog", "cat", "猫", "[SEP]"]
    assert less.encode("red dog cat 猫").tokens == ["[CLS]", "red", "dog", "c", "##a", "##t", "猫", "[SEP]"]


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["scratch", *map(str, arguments)])
    try:
        scratch.main()
    except SystemExit as error:
        return error.code, capsys.readouterr().err
    return 0, capsys.readouterr().out


def test_the_command_reads_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "captions.txt").write_text("一只猫\n\n  two dogs \n", encoding="utf-8")
    code, told = run(monkeypatch, capsys, tmp_path / "new", f"--captions={tmp_path}/captions.txt", "--hidden_size=16")
    assert code == 0
    assert told.count("\n") == 1
    encoder = load_text_encoder(str(tmp_path / "new"))
    assert check_prompts(encoder, ["一只猫", "Two dogs"]) == []
    assert json.loads((tmp_path / "new" / "config.json").read_text())["hidden_size"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{full}"], "is not empty: choose a new directory"),
        (["{full}/file.txt"], "cannot write"),
        (["{new}", "--captions={new}/none.txt"], "cannot be read"),
        (["{new}", "--captions={full}/blank.txt"], "has no caption"),
        (["{new}", "--captions={full}/latin.txt"], "is not UTF-8"),
        (["{new}", "--languages=en,fr"], "choose from en, zh"),
        (["{new}", "--captions={full}/file.txt", "--heads=3"], "does not divide among --heads=3"),
        (["{new}", "--captions={full}/file.txt", "--layers=0"], "at least 1"),
        (["{new}", "--captions={full}/file.txt", "--max_length=2"], "at least 8"),
        (["{new}", "--captions={full}/file.txt", "--vocab=40"], "characters alone are"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file.txt").write_text("a red circle\n")
    (full / "blank.txt").write_text("\n \n")
    (full / "latin.txt").write_bytes("ein grüner Kreis".encode("latin-1"))
    before = sorted(full.iterdir())
    code, told = run(monkeypatch, capsys, *(a.format(full=full, new=tmp_path / "new") for a in arguments))
    assert code == 2
    assert message in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert sorted(full.iterdir()) == before
    assert not (tmp_path / "new" / "config.json").exists()
