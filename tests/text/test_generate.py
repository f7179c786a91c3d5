"""Generation: greedy tokens are transformers', sampling follows its definition, rows and settings are what they say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.parallel.mesh import MeshConfig, make_mesh
from jaxgen.text import generate as generation
from jaxgen.text.decoder import Decoder
from jaxgen.text.generate import choose, load_language_model
from tests.text.cases import NAMES, Case

WRITERS = [name for name in NAMES if Case(name).head == "lm"]
NEW = 24


def load(name, directory, **settings):
    directory.mkdir(parents=True, exist_ok=True)
    Case(name).write(directory)
    return load_language_model(str(directory), **settings)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load("llama3", tmp_path_factory.mktemp("models") / "llama3")


@pytest.fixture(scope="module")
def prompts():
    stored = Case("llama3").stored
    return [ids[mask > 0].tolist() for ids, mask in zip(stored["prompt"], stored["prompt_mask"], strict=True)]


@pytest.mark.parametrize("name", WRITERS)
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    stored = Case(name).stored
    found = load(name, tmp_path).generate(stored["prompt"], stored["prompt_mask"], max_new_tokens=64, ends=())
    np.testing.assert_array_equal(found, stored["generated"])


def test_a_mesh_changes_nothing(tmp_path, prompts):
    stored = Case("llama3").stored
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    model = load("llama3", tmp_path, mesh=mesh)
    assert len(model.params["layers"]["0"]["q"]["kernel"].sharding.device_set) == 4
    np.testing.assert_array_equal(model.generate(prompts, max_new_tokens=NEW, ends=()), stored["generated"][:, :NEW])


@pytest.mark.parametrize("count", [2, 8])
def test_an_end_token_ends_its_own_row(llama, prompts, count):
    full = Case("llama3").stored["generated"].tolist()
    ends = [full[0][9], full[1][17]]
    wanted = [row[: min(row.index(end) for end in ends if end in row)] if set(ends) & set(row) else row for row in full]
    others = sorted(set(range(97)) - {token for row in full for token in row})
    found = llama.generate(prompts, max_new_tokens=64, ends=[*ends, *others[: count - 2]])
    assert found == wanted
    assert len({*map(len, found)}) > 1
    assert llama.generate(prompts, max_new_tokens=64, ends=(full[0][0],))[0] == []


def test_it_ends_as_soon_as_all_rows_have(llama, prompts, monkeypatch):
    calls = []
    plain = Decoder.logits

    def counted(self, last):
        jax.debug.callback(lambda: calls.append(1))
        return plain(self, last)

    monkeypatch.setattr(Decoder, "logits", counted)
    full = Case("llama3").stored["generated"].tolist()
    end = full[0][9]
    # A length of its own, so that this program is compiled here and used nowhere else.
    assert llama.generate(prompts[:1], max_new_tokens=61, ends=[end]) == [full[0][: full[0].index(end)]]
    jax.effects_barrier()
    assert len(calls) == full[0].index(end) + 1


def test_rows_do_not_know_of_each_other(llama, prompts):
    hot = {"max_new_tokens": NEW, "temperature": 1.5, "seed": 3, "ends": ()}
    together = llama.generate(prompts, **hot)
    assert llama.generate(prompts[:1], **hot) == together[:1]
    assert llama.generate([prompts[0], prompts[2], prompts[1]], **hot)[0] == together[0]
    twice = llama.generate([prompts[0], prompts[0], prompts[0]], **hot)
    assert twice[0] == together[0]
    assert twice[0] != twice[1] != twice[2]


def test_nor_do_rows_whose_rotary_positions_hang_on_their_length(tmp_path, prompts):
    model = load("llama_dynamic", tmp_path)
    together = model.generate(prompts, max_new_tokens=NEW, ends=())
    for prompt, found in zip(prompts, together, strict=True):
        assert model.generate([prompt], max_new_tokens=NEW, ends=()) == [found]


def test_a_seed_decides(llama, prompts):
    hot = {"max_new_tokens": NEW, "temperature": 1.0, "ends": ()}
    assert llama.generate(prompts, seed=1, **hot) == llama.generate(prompts, seed=1, **hot)
    assert llama.generate(prompts, seed=1, **hot) != llama.generate(prompts, seed=2, **hot)
    # So hot that all tokens are alike: another draw each time, each of its own.
    for row in llama.generate(prompts, seed=1, **hot | {"temperature": 1e9}):
        assert len(set(row)) > NEW // 2


def test_a_seed_of_its_own_goes_with_a_prompt_wherever_it_stands(llama, prompts):
    hot = {"max_new_tokens": NEW, "temperature": 1.5, "ends": ()}
    first = llama.generate(prompts, seed=[5, 6, 7], **hot)
    assert llama.generate([prompts[2], prompts[0], prompts[1]], seed=[7, 5, 6], **hot) == [first[2], first[0], first[1]]
    assert llama.generate(prompts, seed=[5, 6, 8], **hot)[:2] == first[:2]
    assert llama.generate(prompts, seed=[5, 6, 8], **hot)[2] != first[2]
    one = llama.generate([prompts[0]] * 3, seed=[1, 1, 2], **hot)
    assert one[0] == one[1] != one[2]
    with pytest.raises(UserError, match="2 seeds for 3 prompts: give one each"):
        llama.generate(prompts, seed=[5, 6])


def test_a_fingerprint_is_of_all_that_decides_what_is_written(tmp_path, llama):
    files = {"config.json": "{}", "generation_config.json": "{}", "tokenizer.json": "{}", "model.safetensors": "weights"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    first = generation.fingerprint(str(tmp_path))
    (tmp_path / "README.md").write_text("notes")
    assert generation.fingerprint(str(tmp_path)) == first
    for name in files:
        (tmp_path / name).write_text(files[name] + " ")
        assert generation.fingerprint(str(tmp_path)) != first, name
        (tmp_path / name).write_text(files[name])
    assert generation.fingerprint(str(tmp_path)) == first


def test_new_settings_compile_nothing(llama, prompts):
    greedy = llama.generate(prompts, max_new_tokens=NEW, ends=())
    count = generation._generate._cache_size()
    for settings in (
        {"temperature": 0.7},
        {"temperature": 1.3, "seed": 9},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.5, "top_k": 7},
        {"ends": (5,)},
        {"ends": tuple(range(40, 48))},
    ):
        llama.generate(prompts, **{"max_new_tokens": NEW, "ends": ()} | settings)
    llama.generate([prompt[:9] for prompt in prompts], max_new_tokens=NEW)
    assert llama.generate(prompts, max_new_tokens=NEW, temperature=2.0, top_k=1, ends=()) == greedy
    assert llama.generate(prompts, max_new_tokens=NEW, temperature=2.0, top_p=1e-6, ends=()) == greedy
    assert generation._generate._cache_size() == count
    llama.generate(prompts, max_new_tokens=NEW - 1)
    assert generation._generate._cache_size() == count + 1


LOGITS = np.array([0.3, 2.0, -1.0, 1.2, 1.1, -3.0, 0.0])


def expected(temperature, top_k, top_p):
    """Probabilities by their definition, token by token."""
    weights = np.exp(LOGITS / temperature)
    order = np.argsort(-weights)
    kept = list(order[:top_k] if top_k else order)
    total, nucleus, mass = weights[kept].sum(), [], 0.0
    for token in kept:
        nucleus.append(token)
        mass += weights[token] / total
        if mass >= top_p:
            break
    out = np.zeros(len(LOGITS))
    out[nucleus] = weights[nucleus] / weights[nucleus].sum()
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.5, 0, 1.0), (1.0, 3, 1.0), (1.0, 9, 1.0), (1.0, 0, 0.6), (1.4, 0, 0.9), (1.4, 4, 0.75)],
)
def test_what_is_drawn_has_the_stated_distribution(temperature, top_k, top_p):
    count = 40_000
    logits = jnp.tile(jnp.asarray(LOGITS, jnp.float32), (count, 1))
    drawn = choose(logits, jax.random.split(jax.random.key(0), count), temperature, jnp.int32(top_k), top_p)
    assert drawn.dtype == jnp.int32
    share, wanted = np.bincount(drawn, minlength=len(LOGITS)) / count, expected(temperature, top_k, top_p)
    assert set(np.flatnonzero(share)) <= set(np.flatnonzero(wanted))
    assert (np.abs(share - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / count)).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_cold_means_the_likeliest(temperature):
    drawn = choose(jnp.asarray(LOGITS[None] * [[1], [-1]]), jax.random.split(jax.random.key(0)), temperature, jnp.int32(0), 1.0)
    assert drawn.tolist() == [1, 5]


def test_texts_in_texts_out_and_ends_from_the_files(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    Case("llama3").write(tmp_path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    model = load_language_model(str(tmp_path))
    assert model.ends == (2,)
    ids = model.generate([[5, 9, 11], [7]], max_new_tokens=NEW)
    texts = [" ".join(f"w{i}" for i in row) for row in ids]
    assert model.generate(["w5 w9 w11", "w7"], max_new_tokens=NEW) == texts
    assert model.generate("w5 w9 w11", max_new_tokens=NEW) == texts[:1]
    assert model.generate([], max_new_tokens=NEW) == []
    for said, ends in ((ids[0][3], (ids[0][3],)), ([ids[0][3], 2], (ids[0][3], 2))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        model = load_language_model(str(tmp_path))
        assert model.ends == ends
        assert model.generate([[5, 9, 11]], max_new_tokens=NEW) == [ids[0][: ids[0].index(ids[0][3])]]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "2"}')
    with pytest.raises(UserError, match="eos_token_id='2' is no token's id"):
        load_language_model(str(tmp_path))


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[5]], {"temperature": -1.0}, "temperature=-1.0 and top_k=0 at least 0"),
        ([[5]], {"top_k": -1}, "top_k=-1 at least 0"),
        ([[5]], {"top_p": 0.0}, r"top_p=0.0 in \(0, 1\]"),
        ([[5]], {"top_p": 1.5}, r"top_p=1.5 in \(0, 1\]"),
        ([[97]], {}, "a prompt needs token ids from 0 to 96"),
        ([[]], {}, "a prompt needs token ids from 0 to 96, at least one"),
        ([[5] * 100], {}, "a prompt of 100 tokens and max_new_tokens=64 are more than the 128 positions"),
        (["a"], {}, "has no tokenizer"),
    ],
)
def test_what_makes_no_sense_is_told(llama, prompt, settings, message):
    with pytest.raises(UserError, match=message):
        llama.generate(prompt, **settings)


def test_a_model_without_a_head_that_writes_is_refused(tmp_path):
    Case("t5").write(tmp_path)
    with pytest.raises(UserError, match="it has no lm head"):
        load_language_model(str(tmp_path))
