import os

import pytest

from jaxgen.errors import UserError
from jaxgen.storage import as_path, read_json, write_bytes, write_json


def test_a_file_is_replaced_whole(tmp_path):
    file = as_path(tmp_path / "deep" / "a.json")
    write_json(file, {"a": 1})
    write_json(file, {"b": "é"})
    assert read_json(file) == {"b": "é"}
    assert os.listdir(tmp_path / "deep") == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    file = as_path(tmp_path / "a")
    write_bytes(file, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_json_that_is_missing_or_broken_is_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_json(as_path(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        read_json(as_path(tmp_path / "broken.json"))
