# pyright: reportMissingImports=false
# (torch may live in an environment of its own)
"""Takes `train_step.py`'s steps with PyTorch; started by it, needs no JAX.

Modules have the names of ours, so that weights come over as they are called.
"""

import json
import os
import platform
import sys
import time

import numpy as np
import torch
from torch import nn

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def conv(inputs, outputs, size, stride):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3, 1), nn.BatchNorm2d(outputs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.conv_shortcut = conv(inputs, outputs, 1, stride)
            self.norm_shortcut = nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.projects:
            x = self.norm_shortcut(self.conv_shortcut(x))
        return torch.relu(x + y)


class ResNet(nn.Module):
    """Normalized pixels, stem, stages of blocks and the global average."""

    def __init__(self, width, blocks):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.stem, self.stem_norm = conv(3, width, 3, 1), nn.BatchNorm2d(width)
        self.blocks, inputs = [], width
        for stage, count in enumerate(blocks):
            for block in range(count):
                outputs, stride = width * 2**stage, 2 if stage and not block else 1
                self.blocks.append(Block(inputs, outputs, stride))
                self.add_module(f"stage{stage}_block{block}", self.blocks[-1])
                inputs = outputs

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem((x - self.mean) / self.std)))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


class MnistCnn(nn.Module):
    """Twice (5x5 convolution, BatchNorm, ReLU, 2x2 average), flattened channels last."""

    def __init__(self):
        super().__init__()
        self.Conv_0, self.BatchNorm_0 = nn.Conv2d(1, 40, 5), nn.BatchNorm2d(40)
        self.Conv_1, self.BatchNorm_1 = nn.Conv2d(40, 100, 5), nn.BatchNorm2d(100)

    def forward(self, x):
        x = nn.functional.avg_pool2d(torch.relu(self.BatchNorm_0(self.Conv_0(x))), 2)
        x = nn.functional.avg_pool2d(torch.relu(self.BatchNorm_1(self.Conv_1(x))), 2)
        return x.permute(0, 2, 3, 1).flatten(1)


class FastCnn(nn.Module):
    """Fixed patches, then three stages: convolution, 2x2 maxima, and another convolution."""

    def __init__(self, widths=(64, 128, 256)):
        super().__init__()
        self.register_buffer("patches", torch.zeros(12, 3, 2, 2))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        inputs = 24
        for stage, width in enumerate(widths):
            for half in range(2):
                self.add_module(f"Conv_{2 * stage + half}", conv(inputs, width, 3, 1))
                self.add_module(f"BatchNorm_{2 * stage + half}", nn.BatchNorm2d(width))
                inputs = width

    def forward(self, x):
        x = nn.functional.conv2d((x - self.mean) / self.std, self.patches)
        x = torch.relu(torch.cat([x, -x], 1))
        for layer in range(6):
            x = getattr(self, f"Conv_{layer}")(x)
            if layer % 2 == 0:
                x = nn.functional.max_pool2d(x, 2)
            x = torch.relu(getattr(self, f"BatchNorm_{layer}")(x))
        return x.amax((2, 3)) / 8


NETWORKS = {
    "ResNet-18 of width 8, one block a stage, 3 stages": lambda: ResNet(8, (1, 1, 1)),
    "ResNet-18 of width 16": lambda: ResNet(16, (2, 2, 2, 2)),
    "ResNet-18 of width 64": lambda: ResNet(64, (2, 2, 2, 2)),
    "MNIST CNN": MnistCnn,
    "fast CNN": FastCnn,
}


def to_torch(name, array):
    """Returns a leaf under PyTorch's name and in its layout."""
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    name = name.removesuffix("kernel").removesuffix("scale")
    name = name + "weight" if name.endswith(".") else name
    return name, torch.tensor(np.ascontiguousarray(array.T if array.ndim == 2 else array))


def prepare(steps, command):
    arrays = dict(np.load(command["path"]))
    images, labels = torch.tensor(arrays.pop("images")), torch.tensor(arrays.pop("labels")).long()
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    patches = arrays.pop("patches", None)
    weights = dict(to_torch(name, array) for name, array in arrays.items())
    body = NETWORKS[command["network"]]()
    head = nn.Linear(*reversed(weights["head.weight"].shape))
    model = nn.Sequential()
    model.add_module("body", body)
    model.add_module("head", head)
    if weights.keys() != dict(model.named_parameters()).keys():
        raise ValueError(f"other parameters: {weights.keys() ^ dict(model.named_parameters())}")
    model.load_state_dict(weights, strict=False)  # statistics start as they are
    if patches is not None:
        body.patches.copy_(torch.tensor(patches.transpose(3, 2, 0, 1)))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), command["rate"], momentum=0.9, nesterov=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    steps[command["name"]] = step
    return {"loss": step()}


def sample(steps, command):
    start = time.perf_counter()
    for _ in range(command["repeats"]):
        steps[command["name"]]()
    return {"seconds": time.perf_counter() - start}


def versions(steps, command):
    del steps, command
    return {"python": platform.python_version(), "torch": torch.__version__}


COMMANDS = {"prepare": prepare, "sample": sample, "versions": versions}


def main():
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    steps = {}
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(COMMANDS[command["do"]](steps, command)), flush=True)


if __name__ == "__main__":
    main()
