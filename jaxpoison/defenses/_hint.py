"""HINT: healthy influential-noise based training (arXiv 2309.08549, Algorithms 1 to 3).

    v      = grad of the mean trusted loss,   s = (H + damping I)^-1 v      (last linear layer)
    D_s    = the ceil(r n) examples with the largest |I_up(z)|, chosen once, at the first update
    noise <- clip(noise - gamma I_pert(x + noise), -beta, beta),   x + noise in [0, 1]

at every epoch of `schedule`. Moving a pixel against I_pert lowers, to first order, the trusted loss
of the model trained on it. The noise is added to the stored image, before augmentation; labels and
the other examples stay as they are.

Cost of an update, in forward passes over the training set: one for the features (from which both
the Hessian and the scores follow) and 2 r for the pixel maps (forward, and backward to the pixels).
"""

import dataclasses
import math
import time
from typing import Literal, NamedTuple, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import curvature, influence, solvers
from jaxpoison.core import devices, loops
from jaxpoison.data import Dataset, check, check_trusted, to_float
from jaxpoison.models import Classifier
from jaxpoison.training.hooks import Defense, keep_batch


@dataclasses.dataclass(frozen=True)
class HintConfig:
    """Settings of HINT; the defaults are the paper's for CIFAR-10, in full precision."""

    ratio: float = 0.5
    """Share r of the training set that receives noise, in (0, 1]; with `mass`, at most so much."""
    mass: float | None = None
    """If given, r is the smallest whose examples hold this share, in (0, 1), of all |I_up|."""
    beta: float = 0.062
    """Largest absolute noise on a pixel, in units of [0, 1]."""
    gamma: float = 0.1
    """Step: noise moves by gamma times the pixel influence."""
    step: Literal["scaled", "sign"] = "scaled"
    """"sign" is a control: noise moves by gamma times the influence's sign."""
    selection: Literal["influence", "random"] = "influence"
    """"random" is a control: D_s is drawn at random."""
    schedule: tuple[int, ...] = (5, 15, 40)
    """Epochs (finished epochs, from 0) before which the noise is updated."""
    solver: Literal["cg", "cholesky", "lissa", "identity"] = "cg"
    """How (H + damping I) s = v is solved; "lissa" is the authors' way (980 batches of 50)."""
    damping: float = 0.5
    """Added to H's diagonal. The authors' damp = 0.01 at scale = 50 is 0.5."""
    hessian_examples: Literal["all", "chosen"] = "all"
    """H after the first update: over the whole training set (paper) or over D_s (their code)."""
    coordinates: Literal["pixel", "normalised"] = "pixel"
    """The units in which pixel influence is taken. Their code differentiates with respect to the
    normalised input and adds the result to pixels: steps are then std (about 0.2) times as long."""
    late_epoch: int | None = None
    """From this epoch on, gamma is divided by 10 (40 in their code; not in the paper)."""
    storage: Literal["float32", "uint8_floor"] = "float32"
    """Their code stores perturbed images as uint8, rounding down; images that are not whole numbers
    of 255 may then end up to 1/255 below x - beta."""


PAPER = HintConfig()
RELEASED_CODE = HintConfig(
    beta=16 / 255,
    solver="lissa",
    hessian_examples="chosen",
    coordinates="normalised",
    late_epoch=40,
    storage="uint8_floor",
)


class HintState(NamedTuple):
    """What HINT remembers.

    Attributes:
      key: PRNG key; LiSSA and random selection draw from it.
      chosen: int32 [ceil(r n)], ascending; indices of D_s, meaningless before the first update.
        Where `mass` takes fewer examples, the last entries are n.
      noise: float32 [ceil(r n), H, W, C], x~ - x of the chosen examples; zero at first.
    """

    key: jax.Array
    chosen: jax.Array
    noise: jax.Array


def hint(
    model: Classifier,
    trusted: Dataset,
    config: HintConfig = PAPER,
    *,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Defense:
    """Returns HINT as a defence.

    The info of an update holds `residual` and `solver_steps` of the solve; `step_255_q50`, `_q90`,
    `_q99`: quantiles of 255 gamma |I_pert| over chosen pixels (below 1, uint8 storage would lose
    the step); `share_at_beta`: share of chosen pixels whose noise is at +-beta; the seconds of its
    parts, `features_seconds`, `solve_seconds`, `scores_seconds` (first update only) and
    `pixel_maps_seconds`; `chosen`; and with `mass` the share `ratio` that it takes.

    Args:
      model: the network that is trained; its head is the layer that influence acts through.
      trusted: clean validation images, at least two classes.
      config: see `HintConfig`.
      batch_size: examples in one pass for features and pixel maps; None: as in
        `loops.even_batches`.
      mesh: devices to use; default all.

    Raises:
      ValueError: from here for bad settings or a bad trusted set, from `init` if r n < 1 or the
        training set is bad. DivergedError (from `on_epoch`): if the solve failed.
    """
    _check(config)
    check_trusted(trusted, model.num_classes)
    mesh = devices.data_mesh() if mesh is None else mesh
    trusted = devices.replicate(trusted, mesh)
    solver = _solver(config)
    step_scale = jnp.asarray(model.std) ** 2 if config.coordinates == "normalised" else 1.0

    def features_of(variables, images):
        return model.apply(variables, to_float(images), method="features")

    def loss_fn(head, variables, batch):
        images, labels = batch
        return influence.linear_head_loss(head, (features_of(variables, images), labels))

    features = loops.map_batches(features_of, batch_size=batch_size, mesh=mesh)

    def batch_pixel_influence(constants, batch):
        variables, s = constants
        head = variables["params"]["head"]
        return influence.pixel_influence(
            lambda head, batch: loss_fn(head, variables, batch), head, s, batch
        )

    pixel_influence = loops.map_batches(batch_pixel_influence, batch_size=batch_size, mesh=mesh)

    @jax.jit
    def solve(head, group, train, key):
        # On GPU and TPU the default products keep too few digits for a small residual.
        with jax.default_matmul_precision("highest"):
            return influence.group_ihvp(
                influence.linear_head_loss,
                head,
                group,
                train,
                solver=solver,
                curvature=curvature.linear_head,
                key=key,
            )

    @jax.jit
    def largest_scores(head, s, train):
        scores = influence.example_influence(influence.linear_head_loss, head, s, train)
        num_examples = len(scores)
        sizes, indices = jax.lax.top_k(jnp.abs(scores), _num_chosen(config, num_examples))
        if config.mass is not None:
            before = jnp.cumsum(sizes) - sizes  # what larger scores hold already
            needed = (before < config.mass * jnp.sum(jnp.abs(scores))).at[0].set(True)
            indices = jnp.where(needed, indices, num_examples)
        return jnp.sort(indices).astype(jnp.int32)

    def choose(key, head, s, train):
        num_examples = len(train[1])
        if config.selection == "influence":
            return largest_scores(head, s, train)
        order = jax.random.permutation(jax.random.fold_in(key, 1), num_examples)
        return jnp.sort(order[: _num_chosen(config, num_examples)]).astype(jnp.int32)

    def in_use(state, num_examples):
        """The state without the entries that `mass` leaves over, so that they cost nothing."""
        if config.mass is None:
            return state
        count = int(np.searchsorted(devices.to_host(state.chosen), num_examples))
        return state._replace(chosen=state.chosen[:count], noise=state.noise[:count])

    @jax.jit
    def chosen_examples(state, dataset):
        received = to_float(dataset.images[state.chosen])
        return received, _perturb(received, state.noise), dataset.labels[state.chosen]

    @jax.jit
    def move(received, noise, maps, gamma):
        step = gamma * (jnp.sign(maps) if config.step == "sign" else step_scale * maps)
        moved = _perturb(received, jnp.clip(noise - step, -config.beta, config.beta))
        if config.storage == "uint8_floor":
            # The margin is for whole numbers that rounding has put just below themselves.
            moved = jnp.floor(255 * moved + 1e-3) / 255
        noise = moved - received
        # Of evenly spaced pixels: sorting all of them would take as long as their maps.
        sample = jnp.ravel(step)[:: max(1, step.size // 100_000)]
        quantiles = jnp.quantile(255 * jnp.abs(sample), jnp.array([0.5, 0.9, 0.99]))
        info = {
            "step_255_q50": quantiles[0],
            "step_255_q90": quantiles[1],
            "step_255_q99": quantiles[2],
            "share_at_beta": jnp.mean(jnp.abs(noise) >= 0.999 * config.beta),
        }
        return noise, info

    @jax.jit
    def with_noise(state, dataset):
        images = to_float(dataset.images)
        chosen = _perturb(images[state.chosen], state.noise)
        return dataset._replace(images=images.at[state.chosen].set(chosen, mode="drop"))

    def init(key, dataset):
        check(dataset, model.num_classes)
        num_chosen = _num_chosen(config, len(dataset.labels))
        return devices.replicate(
            HintState(
                key=key,
                chosen=jnp.arange(num_chosen, dtype=jnp.int32),
                noise=jnp.zeros((num_chosen, *dataset.images.shape[1:]), jnp.float32),
            ),
            mesh,
        )

    def update(state, epoch, train_state, dataset):
        variables = train_state.variables
        head = variables["params"]["head"]
        first = epoch == min(config.schedule)
        over_all = first or config.hessian_examples == "all" or config.ratio == 1
        if over_all:
            current = dataset if first else with_noise(state, dataset)
        else:
            current = Dataset(*chosen_examples(in_use(state, len(dataset.labels)), dataset)[1:])
        lap = _Laps()
        train = lap("features", (features(variables, current.images), current.labels))
        group = lap("features", (features(variables, trusted.images), trusted.labels))
        key = jax.random.fold_in(state.key, epoch)
        solution = lap("solve", solve(head, group, train, key))
        if config.solver != "identity":
            solvers.require_usable(solution, f"HINT's solve before epoch {epoch}")
        if first and (config.ratio < 1 or config.mass is not None):
            chosen = lap("scores", choose(state.key, head, solution.value, train))
            state = state._replace(chosen=chosen)
        num_examples = len(dataset.labels)
        part = in_use(state, num_examples)
        received, perturbed, labels = chosen_examples(part, dataset)
        maps = lap("pixel_maps", pixel_influence((variables, solution.value), (perturbed, labels)))
        late = config.late_epoch is not None and epoch >= config.late_epoch
        noise, info = move(received, part.noise, maps, config.gamma / (10 if late else 1))
        if config.mass is not None:
            info["ratio"] = len(noise) / num_examples
            noise = state.noise.at[: len(noise)].set(noise)
        info |= {
            "residual": solution.residual,
            "solver_steps": solution.num_steps,
            "chosen": jnp.zeros(num_examples, bool).at[part.chosen].set(True),
            **lap.seconds,
        }
        return state._replace(noise=noise), info

    def on_epoch(state, epoch, train_state, dataset):
        info = {}
        if epoch in config.schedule:
            state, info = update(state, epoch, train_state, dataset)
        if epoch >= min(config.schedule):
            dataset = with_noise(state, dataset)
        return state, dataset, info

    return Defense(init, on_epoch, keep_batch)


class _Laps:
    """Adds up the seconds that the parts of an update take, compilation included."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, part, value):
        jax.block_until_ready(value)
        now = time.perf_counter()
        name = f"{part}_seconds"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
        return value


def _perturb(images, noise):
    return jnp.clip(images + noise, 0.0, 1.0)


def _num_chosen(config, num_examples):
    if config.ratio * num_examples < 1:
        raise ValueError(
            f"ratio r = {config.ratio} of {num_examples} examples is less than one example: "
            "choose a larger r, or `none()` for no defence"
        )
    # r n in floating point may land just above an integer, as .07 * 100 does.
    return min(math.ceil(config.ratio * num_examples - 1e-9), num_examples)


def _solver(config):
    match config.solver:
        case "cg":
            return solvers.cg(damping=config.damping)
        case "cholesky":
            return solvers.cholesky(damping=config.damping)
        case "lissa":
            return solvers.lissa(damping=config.damping, scale=50.0, num_steps=980, batch_size=50)
        case _:
            return solvers.identity()


def _check(config):
    for field in dataclasses.fields(HintConfig):
        allowed, value = get_args(field.type), getattr(config, field.name)
        if get_origin(field.type) is Literal and value not in allowed:
            raise ValueError(f"{field.name} must be one of {', '.join(allowed)}, not {value!r}")
    if not 0 < config.ratio <= 1:
        raise ValueError(f"ratio r must be in (0, 1], not {config.ratio}")
    if not 0 <= config.beta <= 1:
        raise ValueError(f"beta is in units of pixels in [0, 1], not {config.beta}")
    if not 0 <= config.gamma < math.inf:
        raise ValueError(f"gamma must be finite and not negative, it is {config.gamma}")
    if config.mass is not None:
        if not 0 < config.mass < 1:
            raise ValueError(f"mass must be in (0, 1), or None; it is {config.mass}")
        if config.selection != "influence":
            raise ValueError("mass is a share of the influence: it needs selection='influence'")
    if not config.schedule or min(config.schedule) < 0:
        raise ValueError(f"schedule must name at least one epoch >= 0, it is {config.schedule}")
