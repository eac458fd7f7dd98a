"""From a language model's prediction to the training text behind it, and whether
the prediction is worse without that text.

  python experiments/text_influence.py --preset laptop
  python experiments/text_influence.py --preset large   # 2.4 million parameters
  python experiments/text_influence.py --preset quick

A transformer (Flax NNX) learns Python's own documentation, `pydoc_data.topics`,
which comes with every Python: passages of 128 characters, of which every fifth
is held out. For the held-out passages of one topic at a time the training
passages are ranked by influence through the whole network (EK-FAC), by products
of gradients, by shared words (TF-IDF) and at random. Then the network is
trained again without the first of each ranking, and the loss on the topic's
held-out passages is compared. The same command in the same --run-dir continues.

Writes result.json, table.md, passages.md (what was found for a passage) and
passages.png: the characters of the first passages found, by what a change of
their embeddings would do.
"""

import dataclasses
import functools
import hashlib
import itertools
import platform
import pydoc_data.topics
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import cli
from flax import nnx
from jax.tree_util import Partial
from sklearn.feature_extraction.text import TfidfVectorizer

from jaxpoison import curvature, influence, network, runs, solvers
from jaxpoison.core.files import write_text
from jaxpoison.runs import pictures

HELD_OUT = 5  # every fifth passage
SHOWN = 3  # passages in the listing and the picture
METHODS = {
    "ekfac": "influence, EK-FAC",
    "gradients": "products of gradients",
    "tfidf": "shared words, TF-IDF",
    "random": "at random",
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Settings of one run; the same settings in the same folder continue it."""

    run_dir: Path
    length: int = 128
    """Characters in a passage."""
    width: int = 64
    depth: int = 2
    heads: int = 4
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 3e-3
    """The largest; it rises over a tenth of the steps and falls along a cosine."""
    damping: float = 0.1
    """In units of the mean eigenvalue of the factors."""
    chunk_size: int = 32
    """Passages at a time where influence is computed."""
    topics: int = 3
    """Of the longest topics, so many are asked about."""
    removed: float = 0.05
    """The share of the training passages that is removed."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Whose rankings are tried by training again; none: no training but the first."""
    seeds: tuple[int, ...] = (0, 1)


class Block(nnx.Module):
    """A layer of the transformer: attention and a dense network, each after a norm."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """A causal language model: tokens int [B, T], or their embeddings, to logits [B, T, V]."""

    def __init__(self, config: TextConfig, vocabulary: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, config.width, rngs=rngs)
        self.position = nnx.Embed(config.length, config.width, rngs=rngs)
        self.blocks = nnx.List(
            [Block(config.width, config.heads, rngs) for _ in range(config.depth)]
        )
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, vocabulary, rngs=rngs)

    def __call__(self, x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = self.embed(x)
        x = x + self.position(jnp.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Text(NamedTuple):
    """Passages of all topics.

    Attributes:
      tokens: int32 [N, T + 1]; the first is what the passage before ended with.
      topics: text [N], the topic of each.
      held_out: bool [N].
      characters: of each token.
    """

    tokens: np.ndarray
    topics: np.ndarray
    held_out: np.ndarray
    characters: str

    def part(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns inputs and labels, int32 [n, T]."""
        return self.tokens[rows, :-1], self.tokens[rows, 1:]

    def passage(self, row: int) -> str:
        """Returns the characters that are predicted."""
        return "".join(self.characters[token] for token in self.tokens[row, 1:])


def load(length: int) -> Text:
    """Returns the passages of Python's documentation."""
    documents = pydoc_data.topics.topics
    characters = "".join(sorted(set("".join(documents.values()))))
    place = {character: token for token, character in enumerate(characters)}
    tokens, topics = [], []
    for topic, document in sorted(documents.items()):
        for start in range(0, len(document) - length, length):
            passage = document[start : start + length + 1]
            tokens.append([place[character] for character in passage])
            topics.append(topic)
    return Text(
        np.array(tokens, np.int32),
        np.array(topics),
        np.arange(len(tokens)) % HELD_OUT == HELD_OUT - 1,
        characters,
    )


def source_of_text() -> dict[str, str]:
    """Returns where the text is from, and its hash: it changes with Python."""
    text = "".join(pydoc_data.topics.topics.values()).encode()
    name = f"pydoc_data.topics of Python {platform.python_version()}"
    return {"source": name, "sha256": hashlib.sha256(text).hexdigest()}


class Language(NamedTuple):
    """The language model as functions of its parameters, and its data."""

    init: Callable[[int], Any]
    losses: Any
    apply: Any
    text: Text
    train: np.ndarray  # rows of `text`
    groups: dict[str, np.ndarray]  # held-out rows of each topic that is asked about


def language(config: TextConfig) -> Language:
    """Returns the model and the data of a run."""
    text = load(config.length)

    def made(seed):
        return network.from_nnx(Transformer(config, len(text.characters), nnx.Rngs(seed)))

    net = made(0)
    apply = network.tapped_logits(net, net.variables)
    names, counts = np.unique(text.topics[text.held_out], return_counts=True)
    longest = names[np.argsort(-counts, kind="stable")][: config.topics]
    return Language(
        init=lambda seed: made(seed).variables["params"],
        losses=Partial(_losses, apply),
        apply=apply,
        text=text,
        train=np.flatnonzero(~text.held_out),
        groups={
            str(name): np.flatnonzero(text.held_out & (text.topics == name)) for name in longest
        },
    )


@jax.jit
def _losses(apply, params, batch):
    """Returns -log probability of each passage, in nats."""
    inputs, labels = batch
    return curvature.cross_entropy(apply(params, inputs), labels)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _epoch(learning_rate, total, losses, state, batches):
    """Returns (parameters and moments, mean loss) after a step on each batch, [S, B, T]."""
    rule = _rule(learning_rate, total)

    def step(state, batch):
        params, moments = state
        size = batch[1].size
        value, gradient = jax.value_and_grad(lambda p: losses(p, batch).sum() / size)(params)
        updates, moments = rule.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), value

    state, values = jax.lax.scan(step, state, batches)
    return state, values.mean()


def _rule(learning_rate, total):
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, total // 10, total)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def fit(work: runs.Work, model: Language, rows: np.ndarray, seed: int, name: str) -> Any:
    """Returns the parameters after training on the passages of these rows."""
    config: TextConfig = work.config
    steps = len(rows) // config.batch_size
    total = steps * config.epochs
    params = model.init(seed)
    state = params, _rule(config.learning_rate, total).init(params)
    random = np.random.default_rng(seed)
    for epoch in range(1, config.epochs + 1):
        order = random.permutation(rows)[: steps * config.batch_size]
        batches = jax.tree.map(
            lambda x: x.reshape(steps, config.batch_size, -1), model.text.part(order)
        )
        state, loss = _epoch(config.learning_rate, total, model.losses, state, batches)
        told = f"{name}: epoch {epoch} of {config.epochs}, {float(loss):.3f} nats a character"
        work.tell(told, finished=1)
    return state[0]


def outcome(model: Language, params: Any) -> dict[str, float]:
    """Returns nats a character of each topic's held-out passages."""
    found = {}
    for topic, rows in model.groups.items():
        batch = model.text.part(rows)
        found[topic] = float(model.losses(params, batch).sum() / batch[1].size)
    return found


# What training passages a loss comes from.


class Engine:
    """Influence through all parameters of a trained model; EK-FAC's factors are made once.

    Attributes:
      seconds: what each part took.
      residual: of the last answer by EK-FAC, measured with the true Gauss-Newton matrix.
    """

    def __init__(self, config: TextConfig, model: Language, params: Any):
        self.model, self.params, self.chunk_size = model, params, config.chunk_size
        self.train = jax.tree.map(jnp.asarray, model.text.part(model.train))
        self.seconds: dict[str, float] = {}
        self.residual = float("nan")
        self.factors = self._timed(
            "factors",
            lambda: curvature.ekfac(
                model.apply, curvature.cross_entropy, params, self.train,
                chunk_size=self.chunk_size, num_samples=1, key=jax.random.key(0),
            ),
        )  # fmt: skip
        values = np.concatenate([np.ravel(block.eigenvalues) for block in self.factors.blocks])
        self.damping = config.damping * float(values.mean())

    def direction(self, rows: np.ndarray, solver: Any) -> Any:
        """Returns (C + damping I)^-1 times the gradient of the mean loss of these passages."""
        solution = influence.group_ihvp(
            self.model.losses, self.params, self.model.text.part(rows), self.train,
            solver=solver, chunk_size=self.chunk_size,
            curvature=curvature.gauss_newton(self.model.apply, curvature.cross_entropy),
        )  # fmt: skip
        self.residual = float(solution.residual)
        return solution.value

    def scores(self, rows: np.ndarray, method: str) -> tuple[np.ndarray, Any]:
        """Returns (influence of each training passage, harmful ones positive; the direction)."""
        solver = solvers.identity()
        if method == "ekfac":
            solver = solvers.ekfac(self.factors, damping=self.damping)
        ihvp = self._timed("solve", lambda: self.direction(rows, solver))
        scores = self._timed(
            "scores",
            lambda: influence.example_influence(
                self.model.losses, self.params, ihvp, self.train, chunk_size=self.chunk_size
            ),
        )
        return np.asarray(scores), ihvp

    def map(self, ihvp: Any, row: int) -> np.ndarray:
        """Returns what a longer embedding of each character would do to the loss, [T]."""
        tokens, labels = self.model.text.part(np.array([row]))
        embeddings = self.params["embed"]["embedding"][tokens]
        found = influence.pixel_influence(
            self.model.losses, self.params, ihvp, (embeddings, jnp.asarray(labels))
        )
        return np.asarray(jnp.sum(found * embeddings, axis=-1)[0])

    def _timed(self, name, make):
        start = time.perf_counter()
        made = jax.block_until_ready(make())
        self.seconds[name] = time.perf_counter() - start
        return made


def rankings(config: TextConfig, engine: Engine) -> dict[str, Any]:
    """Returns, for each topic and method, places in the training set, most helpful first.

    And what removing the first of EK-FAC's should do to the loss, in nats a character.
    """
    model = engine.model
    words = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True)
    vectors = words.fit_transform([model.text.passage(row) for row in model.train])
    found: dict[str, Any] = {}
    for index, (topic, rows) in enumerate(model.groups.items()):
        influences = {name: engine.scores(rows, name)[0] for name in ("gradients", "ekfac")}
        found_words: Any = words.transform([model.text.passage(row) for row in rows])
        asked = found_words.mean(axis=0)
        keys = influences | {
            "tfidf": -np.asarray(vectors @ np.asarray(asked).T)[:, 0],
            "random": np.random.default_rng(index).random(len(model.train)),
        }
        count = num_removed(config, model)
        orders = {name: np.argsort(keys[name], kind="stable") for name in METHODS}
        predicted = -influences["ekfac"][orders["ekfac"][:count]].sum() / len(model.train)
        found[topic] = {
            "orders": {name: order[:count].tolist() for name, order in orders.items()},
            "predicted": float(predicted / config.length),
            "residual": engine.residual,
        }
    return found


def num_removed(config: TextConfig, model: Language) -> int:
    """Returns how many training passages are removed."""
    return round(config.removed * len(model.train))


# One passage, for people to look at.


class Example(NamedTuple):
    """A held-out passage, and the training passages that help most to predict it."""

    topic: str
    text: str
    found: dict[str, list[str]]  # by method
    maps: list[np.ndarray]  # of EK-FAC's passages, [T] each


def examples(engine: Engine) -> list[Example]:
    """Returns one passage of each topic, the middle one."""
    model, made = engine.model, []
    for topic, rows in model.groups.items():
        row = rows[len(rows) // 2]
        found, maps = {}, []
        for method in ("gradients", "ekfac"):
            scores, ihvp = engine.scores(np.array([row]), method)
            first = model.train[np.argsort(scores, kind="stable")[:SHOWN]]
            found[METHODS[method]] = [model.text.passage(each) for each in first]
            if method == "ekfac":
                maps = [engine.map(ihvp, each) for each in first]
        made.append(Example(topic, model.text.passage(row), found, maps))
    return made


def listing(shown: list[Example]) -> str:
    """Returns the examples in Markdown."""
    parts = ["# Held-out passages, and the training passages that help most to predict them"]
    for example in shown:
        parts += [f"## {example.topic}", _quoted(example.text)]
        for method, passages in example.found.items():
            parts += [f"By {method}:", *map(_quoted, passages)]
    return "\n\n".join(parts) + "\n"


def _quoted(text):
    return "\n".join(["```text", *text.splitlines(), "```"])


def draw(shown: list[Example], path: Path, columns: int = 64) -> None:
    """Draws the passages found by EK-FAC, each character on what it adds."""
    plt = pictures.pyplot()
    lines = [-(-len(example.text) // columns) for example in shown]
    height = sum((1 + SHOWN) * (count + 1.5) for count in lines)
    figure = plt.figure(figsize=(7, 0.2 * height))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(-1, columns + 1), ylim=(height, 0))
    axis.axis("off")
    y = 0.5
    for example in shown:
        blocks = [(f"held out, {example.topic}", example.text, np.zeros(len(example.text)))]
        passages = example.found[METHODS["ekfac"]]
        # The map is over what is read, a character earlier than what is predicted.
        blocks += [
            (f"found, number {number}", passage, np.append(found[1:], 0.0))
            for number, (passage, found) in enumerate(
                zip(passages, example.maps, strict=True), start=1
            )
        ]
        for title, text, values in blocks:
            y = _draw_block(axis, title, text, values, y, columns)
    pictures.save(figure, path, dpi=110)


def _draw_block(axis, title, text, values, y, columns):
    """Draws a passage from line `y` on, red where it harms; returns the line after it."""
    axis.text(0, y, title, fontsize=8, color="gray", va="center")
    largest = np.abs(values).max() or 1.0
    for index, (character, value) in enumerate(zip(text, values, strict=True)):
        row, column = divmod(index, columns)
        strength = abs(value) / largest
        color = (1, 1 - strength, 1 - strength) if value > 0 else (1 - strength, 1 - strength, 1)
        axis.add_patch(
            pictures.pyplot().Rectangle((column, y + row + 0.5), 1, 1, color=color, linewidth=0)
        )
        shown = {"\n": "\u21b5", "$": r"\$"}.get(character, character)
        centered = {"ha": "center", "va": "center", "family": "monospace"}
        axis.text(column + 0.5, y + row + 1, shown, fontsize=7, **centered)
    return y + -(-len(text) // columns) + 1.5


# The run.


def experiment(config: TextConfig) -> None:
    """Trains, ranks, trains again, and writes results, listing and picture.

    Raises:
      RuntimeError: at the end, if cells failed; their errors are in the results.
    """
    config = runs.plain(config)
    settings = dataclasses.asdict(config)
    lasting = {name: value for name, value in settings.items() if name not in ("methods", "seeds")}
    lasting["text"] = source_of_text()
    output = runs.Run(config.run_dir, lasting, check=lambda: check(config))
    model = language(config)
    again = len(model.groups) * len(config.methods)
    with runs.Meter(config.epochs * len(config.seeds) * (1 + again)) as meter:
        work = runs.Work(config=config, output=output, meter=meter)

        def cell(name, make):
            if not runs.succeeded(output.finished(name)):
                output.finish(name, runs.attempt(make))
            else:
                work.done += config.epochs
            row = output.finished(name)
            assert row is not None
            return row

        def retrained(rows, seed, name):
            return cell(
                name, lambda: {"losses": outcome(model, fit(work, model, rows, seed, name))}
            )

        name = f"first-{config.seeds[0]}"
        first = cell(name, lambda: first_network(work, model))
        runs.require_no_errors({name: first})
        cells = {f"whole-{config.seeds[0]}": first}
        for seed in config.seeds[1:]:
            name = f"whole-{seed}"
            cells[name] = retrained(model.train, seed, name)
        for topic, method, seed in itertools.product(model.groups, config.methods, config.seeds):
            removed = first["rankings"][topic]["orders"][method]
            name = f"{topic}-{method}-{seed}"
            cells[name] = retrained(np.delete(model.train, removed), seed, name)
    good = {name: row for name, row in cells.items() if runs.succeeded(row)}
    rows = [
        comparison(config, model, good, topic, method)
        for topic, method in itertools.product(model.groups, config.methods)
    ]
    more = {name: first[name] for name in ("parameters", "passages", "seconds", "memory")}
    table = report(config, rows, more)
    output.write_result(rows, table, **more)
    runs.say("\n" + table)
    runs.require_no_errors(cells)


def first_network(work: runs.Work, model: Language) -> dict[str, Any]:
    """Trains the network that is asked, and returns its losses and rankings."""
    config: TextConfig = work.config
    start = time.perf_counter()
    params = fit(work, model, model.train, config.seeds[0], f"first-{config.seeds[0]}")
    seconds = {"training": time.perf_counter() - start}
    engine = Engine(config, model, params)
    ranked = rankings(config, engine)
    shown = examples(engine)
    write_text(config.run_dir / "passages.md", listing(shown))
    draw(shown, config.run_dir / "passages.png")
    return {
        "losses": outcome(model, params),
        "rankings": ranked,
        "seconds": seconds | engine.seconds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "passages": len(model.train),
        "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def comparison(config, model, cells, topic, method) -> dict[str, Any]:
    """Returns what removing a method's first passages did to a topic's loss, over the seeds."""
    first = cells[f"whole-{config.seeds[0]}"]
    ranked = first["rankings"][topic]
    removed = model.train[ranked["orders"][method]]
    changes = [
        cells[f"{topic}-{method}-{seed}"]["losses"][topic] - cells[f"whole-{seed}"]["losses"][topic]
        for seed in config.seeds
        if f"{topic}-{method}-{seed}" in cells and f"whole-{seed}" in cells
    ]
    return {
        "topic": topic,
        "method": method,
        "removed": len(removed),
        "of_the_topic": int((model.text.topics[removed] == topic).sum()),
        "loss": first["losses"][topic],
        "changes": changes,
        "predicted": ranked["predicted"] if method == "ekfac" else None,
        "residual": ranked["residual"] if method == "ekfac" else None,
    }


def report(config: TextConfig, rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Returns the table in Markdown."""
    header = ["topic", "removed by", "of the topic", "loss", "after removal", "predicted"]
    lines = []
    for row in rows:
        changes = 1000 * np.array(row["changes"])
        spread = f" ± {changes.std(ddof=1):.0f}" if len(changes) > 1 else ""
        lines.append(
            [
                row["topic"],
                METHODS[row["method"]],
                f"{row['of_the_topic']} of {row['removed']}",
                f"{1000 * row['loss']:,.0f}",
                f"{changes.mean():+.0f}{spread}" if len(changes) else "-",
                "-" if row["predicted"] is None else f"{1000 * row['predicted']:+.0f}",
            ]
        )
    return "\n".join(
        [
            f"{source_of_text()['source']}: {facts['passages']:,} training passages of "
            f"{config.length} characters; a transformer of {facts['parameters']:,} parameters.",
            "",
            "Loss on a topic's held-out passages in thousandths of a nat a character, and its "
            "change after training again without the first passages of each ranking: mean ± "
            f"standard deviation of {len(config.seeds)} seeds.",
            "",
            runs.markdown(header, lines),
            "",
            "Seconds: training {training:.0f}, factors {factors:.0f}, a solve with its residual "
            "{solve:.0f}, scores of all passages {scores:.0f}.".format(**facts["seconds"]),
            "",
        ]
    )


def check(config: TextConfig) -> None:
    """Raises ValueError for settings that would fail, or do nothing, only after work was done."""
    unknown = sorted(set(config.methods) - set(METHODS))
    if unknown:
        raise ValueError(f"unknown --methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if not config.seeds:
        raise ValueError("name at least one of --seeds")
    if not 0 < config.removed < 1:
        raise ValueError(f"--removed must be between 0 and 1, not {config.removed:g}")
    if not config.damping > 0:
        raise ValueError(f"--damping must be positive, not {config.damping:g}")
    if config.width % config.heads:
        raise ValueError(f"--width {config.width} must be a multiple of --heads {config.heads}")


LARGE = TextConfig(
    run_dir=Path("runs/text-pydoc-large"), width=224, depth=4, heads=8, methods=(), seeds=(0,)
)
LAPTOP = TextConfig(run_dir=Path("runs/text-pydoc-laptop"))
QUICK = dataclasses.replace(
    LAPTOP, run_dir=Path("runs/text-pydoc-quick"), width=32, depth=1, epochs=2, topics=1, seeds=(0,)
)
PRESETS = {"large": LARGE, "laptop": LAPTOP, "quick": QUICK}

if __name__ == "__main__":
    cli.main(PRESETS, __doc__, experiment)
