import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgen.errors import UserError
from jaxgen.text import load_text_encoder, scratch
from jaxgen.text.pair import PairedTextEncoder

CAPTIONS = ["a small red circle", "two dogs", "a large blue square to the left of a small green ring"]
TEMPLATE = "Describe the picture: {} in detail"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model of three layers whose sentence encoder pools the mean, as MiniLM's."""
    directory = tmp_path_factory.mktemp("scratch") / "encoder"
    scratch.write(directory, [*CAPTIONS, TEMPLATE, "draw now"], hidden_size=24, layers=3, heads=4, vocab=150, max_length=64)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (directory / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]')
    return str(directory)


@pytest.fixture(scope="module")
def plain(source):
    return load_text_encoder(source)


@pytest.fixture(scope="module")
def states(source):
    """All four hidden states, [4, B, T, 24], and the mask."""
    text = load_text_encoder(source, layers=tuple(range(4)))(CAPTIONS)
    return np.stack(np.split(np.asarray(text.hidden), 4, axis=-1)), np.asarray(text.mask)


@pytest.mark.parametrize(("layers", "chosen"), [("last", [3]), (-2, [2]), (0, [0]), ((1, 2, -1), [1, 2, 3])])
def test_layers_are_chosen_and_joined(source, states, layers, chosen):
    encoder = load_text_encoder(source, layers=layers)
    text = encoder(CAPTIONS)
    assert encoder.hidden_size == 24 * len(chosen)
    np.testing.assert_allclose(text.hidden, np.concatenate([states[0][i] for i in chosen], -1), atol=1e-6)


def test_the_average_weighs_layers_alike(source, states):
    text = load_text_encoder(source, layers="average")(CAPTIONS)
    each = (states[0] - states[0].mean(-1, keepdims=True)) / np.sqrt(states[0].var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(text.hidden, each.mean(0), atol=2e-5)


@pytest.mark.parametrize("layers", [4, -5, (), (0, 9), "first", 1.5])
def test_layers_that_are_not_there_are_told(source, layers):
    with pytest.raises(UserError, match="an index from -4 to 3"):
        load_text_encoder(source, layers=layers)


def test_a_template_stands_around_and_is_cut_off_again(source, plain):
    told = load_text_encoder(source, template=TEMPLATE)
    tokens = told.tokenize(["a red circle"])
    written = plain.tokenize(["Describe the picture: a red circle in detail"])
    n = int(written["attention_mask"].sum())
    np.testing.assert_array_equal(tokens["input_ids"][0, :n], written["input_ids"][0, :n])
    cut = told.tokenizer.cut
    assert cut == 1 + len(plain.tokenizer.encode(["Describe the picture:"], 99)[0]) - 2  # [CLS] and the words
    text, whole = told(["a red circle"]), plain(["Describe the picture: a red circle in detail"])
    assert int(text.mask.sum()) == n - cut
    np.testing.assert_allclose(text.hidden[0, : n - cut], whole.hidden[0, cut:n], atol=2e-6)
    np.testing.assert_allclose(text.pooled, whole.pooled, atol=1e-6)
    assert told.fingerprint != plain.fingerprint


def test_a_long_caption_leaves_the_template_whole(source):
    encoder = load_text_encoder(source, max_length=8, template="draw {} now")
    ids = encoder.tokenize(["red " * 50])["input_ids"][0]
    words = encoder.tokenizer.decode(ids)
    assert words.startswith("draw red")
    assert words.endswith("now")
    assert len(ids) == 8 + encoder.tokenizer.cut
    with pytest.raises(UserError, match=r"needs \{\} once"):
        load_text_encoder(source, template="no place")


def test_a_pair_reads_side_by_side(source, plain):
    first, second = plain, load_text_encoder(source, layers=(1, 2))
    a, b = first(CAPTIONS), second(CAPTIONS)
    t = a.mask.shape[1]
    wide = PairedTextEncoder(first, second, "features")
    text = wide(CAPTIONS)
    np.testing.assert_allclose(text.hidden, np.concatenate([a.hidden, b.hidden], -1), atol=1e-6)
    np.testing.assert_allclose(text.pooled, np.concatenate([a.pooled, b.pooled], -1), atol=1e-6)
    np.testing.assert_array_equal(text.mask, a.mask)
    assert text.hidden.shape[-1] == wide.hidden_size
    long = PairedTextEncoder(first, second, "tokens")
    text = long(CAPTIONS)
    assert text.hidden.shape == (3, 2 * t, long.hidden_size)
    for row in range(3):
        n = int(a.mask[row].sum())
        assert text.mask[row].sum() == 2 * n == np.flatnonzero(text.mask[row])[-1] + 1  # real tokens first
        np.testing.assert_allclose(text.hidden[row, :n, :24], a.hidden[row, :n], atol=1e-6)
        np.testing.assert_array_equal(text.hidden[row, :n, 24:], 0)
        np.testing.assert_allclose(text.hidden[row, n : 2 * n], b.hidden[row, :n], atol=1e-6)
    assert len({first.fingerprint, second.fingerprint, wide.fingerprint, long.fingerprint}) == 4


def test_the_pure_function_works_under_every_transformation(plain):
    encoder = plain
    apply, params = encoder.functional()
    tokens = encoder.tokenize([*CAPTIONS, *CAPTIONS, *CAPTIONS[:2]])
    ids, mask = jnp.asarray(tokens["input_ids"]), jnp.asarray(tokens["attention_mask"])
    expected = np.asarray(encoder(ids, mask).pooled)

    one = jax.vmap(lambda i, m: apply(params, i[None], m[None]).pooled[0])
    np.testing.assert_allclose(jax.jit(one)(ids, mask), expected, atol=1e-6)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    split = jax.shard_map(
        lambda p, i, m: apply(p, i, m).pooled, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows
    )
    place = NamedSharding(mesh, rows)
    np.testing.assert_allclose(
        jax.jit(split)(params, jax.device_put(ids, place), jax.device_put(mask, place)), expected, atol=1e-6
    )

    @jax.jit
    def first(params):
        return apply(params, ids[:1], mask[:1]).pooled[0, 0]

    kernel = params["layers"]["1"]["q"]["kernel"]
    grad = jax.jit(jax.grad(first))(params)["layers"]["1"]["q"]["kernel"]
    at = np.unravel_index(int(jnp.abs(grad).argmax()), grad.shape)

    def moved(by):
        layer = {**params["layers"]["1"], "q": {**params["layers"]["1"]["q"], "kernel": kernel.at[at].add(by)}}
        return float(first({**params, "layers": {**params["layers"], "1": layer}}))

    assert (moved(1e-2) - moved(-1e-2)) / 2e-2 == pytest.approx(float(grad[at]), rel=0.05)
