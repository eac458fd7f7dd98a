"""Settings of the experiments with poisons from scratch, and their cells."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax

from jaxpoison import models, runs
from jaxpoison.attacks import DeepConfuseConfig
from jaxpoison.data import Dataset
from jaxpoison.defenses import AblConfig, EpicConfig, FatConfig, FriendsConfig, HintConfig
from jaxpoison.training import Recipe


@dataclasses.dataclass(frozen=True)
class Common:
    """What any experiment with poisons and defenses has to set."""

    dataset: Literal["cifar10", "mnist"]
    """Which images."""
    run_dir: Path
    """Folder for configuration, metrics, checkpoints, poisons, table and picture."""
    recipe: Recipe
    """How every model is trained."""
    hint: HintConfig
    """Settings of HINT."""
    epsilon: float
    """Attack budget: largest change of a pixel, in units of [0, 1]."""
    data: Literal["embedded", "full"] = "full"
    """The small slice inside the package, or the whole set (see --data-dir)."""
    data_dir: str | None = None
    """Folder of tensorflow-datasets, or an .npz; default $TFDS_DATA_DIR."""
    train_examples: int | None = None
    """Use only the first so many training images."""
    trusted_examples: int | None = None
    """Use only the first so many trusted images."""
    test_examples: int | None = None
    """Use only the first so many test images."""
    friends: FriendsConfig = dataclasses.field(default_factory=FriendsConfig)
    """Settings of FRIENDS."""
    fat: FatConfig = dataclasses.field(default_factory=FatConfig)
    """Settings of adversarial training."""
    epic: EpicConfig = dataclasses.field(default_factory=EpicConfig)
    """Settings of EPIC."""
    abl: AblConfig = dataclasses.field(default_factory=AblConfig)
    """Settings of anti-backdoor learning."""
    network: Literal["paper", "fast"] = "paper"
    """The paper's network for these images, or `models.fast_cnn`, for CIFAR-10 alone."""
    width: int = 64
    """Channels of the first stage of the ResNet, or of the fast network."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks in each of the ResNet's stages."""
    bfloat16: bool = False
    """Compute the body of the network in bfloat16."""
    checkpoint_every: int = 5
    """Epochs from one checkpoint to the next."""


@dataclasses.dataclass(frozen=True)
class Config(Common):
    """Settings of one run; the same settings in the same folder continue it."""

    attacks: tuple[str, ...] = ("pgd", "dap", "durp")
    """Attacks that share the poisoned examples equally."""
    epsilon_l2: float = 0.5
    """Budget of dap_l2 and durp_l2: length of an image's change, in units of [0, 1]."""
    dap_steps: int = 100
    """Steps of dap and dap_l2."""
    fowl_steps: int = 250
    """Steps of tap and error_max; Fowl et al. take 250, eight times over."""
    surrogate: Literal["same", "vgg16"] = "same"
    """The network that attacks are crafted against: the victim's, or a VGG-16 as in Tao et al."""
    dc: DeepConfuseConfig = dataclasses.field(default_factory=DeepConfuseConfig)
    """How long the generator of DeepConfuse, dc, is trained."""
    poison_ratios: tuple[float, ...] = (1.0,)
    """Shares p of the training set that are poisoned; p = 0, none is always run."""
    defenses: tuple[str, ...] = ("none", "hint")
    """Defenses to compare at each p, by their names above."""
    controls: tuple[str, ...] = ()
    """More of them, for `control_ratios` alone."""
    control_ratios: tuple[float, ...] = (0.0, 1.0)
    """Those of the poison ratios at which the controls are trained."""
    seeds: tuple[int, ...] = (0,)
    """One independent repetition each: split, poisons, initial weights, order."""
    trusted_epochs: int = 300
    """Epochs of the model that is trained on the trusted images alone."""


# Which settings may differ from run to run of a folder: they only choose cells.
SELECTION = ("defenses", "controls", "poison_ratios", "control_ratios", "seeds")


@dataclasses.dataclass(eq=False, kw_only=True)
class Work(runs.Work):
    """A run in progress, counted in epochs, with the network that its cells train."""

    config: Config
    model: models.Classifier
    trusted: Dataset | None = None
    """Trusted images in place of those of the split."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model to train: one row of the table, for one seed."""

    seed: int
    poison_ratio: float
    defense: str

    @property
    def name(self) -> str:
        if self.defense == "trusted":
            return f"seed{self.seed}-trusted"
        return f"seed{self.seed}-p{self.poison_ratio:g}-{self.defense}"

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Cell":
        """Returns the cell that a row of results is about."""
        return cls(row["seed"], row["poison_ratio"], row["defense"])

    @property
    def key(self) -> jax.Array:
        """The same for all defenses at one p: they differ in nothing but the defense."""
        return jax.random.fold_in(jax.random.key(self.seed), round(1000 * self.poison_ratio))
