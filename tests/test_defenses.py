import jax
import jax.numpy as jnp
import numpy as np
from defended import begin
from networks import Tanh, classifier, one_device

from jaxpoison import training
from jaxpoison.data import Dataset
from jaxpoison.defenses import Defense, chain, none, random_noise
from jaxpoison.training.hooks import Info

RECIPE = training.Recipe(epochs=2, batch_size=8, learning_rate=0.05, milestones=())


MODEL = classifier(Tanh(4))


def random_set():
    rng = np.random.default_rng(0)
    return Dataset(
        rng.random((20, 4, 4, 1), dtype=np.float32), rng.integers(0, 3, 20, dtype=np.int32)
    )


def fit(defense, report=None):
    return training.fit(
        MODEL, RECIPE, random_set(), key=jax.random.key(0), defense=defense, report=report,
        mesh=one_device(),
    )  # fmt: skip


def scale_pixels(factor, info=None):
    """Multiplies the images of an epoch."""

    def on_epoch(state, epoch, train_state, dataset):
        return state + 1, dataset._replace(images=dataset.images * factor), Info(info or {})

    return Defense(lambda key, dataset, num_epochs: jnp.zeros(()), on_epoch)


def add_pixels(term):
    """Adds to the images of an epoch and of a batch."""

    def add(dataset):
        return dataset._replace(images=dataset.images + term)

    return Defense(
        lambda key, dataset, num_epochs: jax.random.bits(key),
        lambda state, epoch, train_state, dataset: (state, add(dataset), Info({"added": term})),
        lambda state, key, train_state, batch: add(batch),
    )


def test_none_and_chains_of_it_change_nothing():
    plain = fit(None)
    for defense in (none(), chain(none(), none())):
        jax.tree.map(np.testing.assert_array_equal, fit(defense), plain)


def test_a_chain_of_one_is_that_defense():
    defended = fit(add_pixels(0.25)).params
    assert np.any(defended["head"]["bias"] != fit(none()).params["head"]["bias"])
    jax.tree.map(np.testing.assert_array_equal, fit(chain(add_pixels(0.25))).params, defended)


def test_a_chain_applies_its_defenses_in_order():
    train = random_set()
    for defenses, want in [
        ((scale_pixels(0.5), add_pixels(0.25)), train.images * 0.5 + 0.25),
        ((add_pixels(0.25), scale_pixels(0.5)), (train.images + 0.25) * 0.5),
    ]:
        defense = chain(*defenses)
        state, collected = begin(defense, jax.random.key(0), train)
        state, dataset, _ = defense.on_epoch(state, 0, None, collected)
        np.testing.assert_allclose(dataset.images, want, rtol=1e-6)
        assert sorted(float(part) for part in state)[0] == 1.0  # the counter has gone on
        np.testing.assert_array_equal(dataset.labels, train.labels)


def test_a_chain_keeps_states_apart_and_joins_what_is_told():
    train = random_set()
    defense = chain(add_pixels(1.0), scale_pixels(2.0, {"scaled": 2.0}), add_pixels(3.0))
    (first, _, third), train = begin(defense, jax.random.key(0), train)
    assert first != third  # keys differ
    _, _, info = defense.on_epoch((first, jnp.zeros(()), third), 0, None, train)
    assert info.metrics == {"added": 3.0, "scaled": 2.0}


def test_on_batch_runs_in_a_chain_in_order_with_keys_of_its_own():
    keys = []

    def noting(factor):
        def on_batch(state, key, train_state, batch):
            keys.append(jax.random.key_data(key))
            return batch._replace(images=factor * (batch.images + 1))

        return Defense(on_batch=on_batch)

    batch = Dataset(jnp.zeros((2, 1, 1, 1)), jnp.zeros(2, jnp.int32))
    got = chain(noting(2.0), noting(10.0)).on_batch(((), ()), jax.random.key(0), None, batch)
    np.testing.assert_array_equal(got.images, np.full((2, 1, 1, 1), 30.0))
    assert np.any(keys[0] != keys[1])


def test_a_defense_written_by_a_user_is_traced_into_the_step():
    seen = []

    def on_batch(state, key, train_state, batch):
        seen.append(isinstance(batch.images, jax.core.Tracer))

        # The gradient by the pixels at the current weights, as adversarial training would take.
        def loss(images):
            return jnp.sum(MODEL.apply(train_state.variables, images)[:, 0])

        noise = 0.1 * jnp.sign(jax.grad(loss)(batch.images))
        noise += state * jax.random.normal(key, batch.images.shape)
        return batch._replace(images=jnp.clip(batch.images + noise, 0, 1))

    defended = fit(Defense(lambda key, dataset, num_epochs: jnp.float32(0.1), on_batch=on_batch))
    assert seen == [True]  # once for all steps of all epochs
    assert np.any(defended.params["head"]["kernel"] != fit(None).params["head"]["kernel"])


def test_the_set_as_collected_is_given_at_every_epoch():
    means = []

    def on_epoch(state, epoch, train_state, dataset):
        means.append(float(jnp.mean(dataset.images)))
        return state, dataset._replace(images=dataset.images * 0), Info()

    fit(Defense(on_epoch=on_epoch))
    assert len(means) == RECIPE.epochs
    assert means[0] == means[1] > 0.1


def test_chains_of_equal_hooks_are_compiled_once():
    first, second = (chain(random_noise(0.1), none()).on_batch for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != chain(random_noise(0.2), none()).on_batch
