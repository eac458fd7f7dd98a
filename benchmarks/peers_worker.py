# pyright: reportMissingImports=false, reportFunctionMemberAccess=false
# (torch, pyDVL, dattri and captum may live in an environment of their own)
"""Does the benchmarks' work with the PyTorch libraries; started by `peers.py`, needs no JAX.

Each library is called through its own public functions, with the options under which it was
fastest. Commands are lines of JSON on standard input:

    prepare   a task for a library; names of what it offers, or why it is absent
    sample    calls one of them so many times; seconds
    answer    writes what it returned, flattened as `problem.flat` does

`torch.func` is what one writes by hand in an afternoon. What is called damping here, lambda in
H + lambda I, is `regularization` in pyDVL and dattri's CG, and damping / scale in dattri's LiSSA.
"""

import collections
import contextlib
import importlib
import json
import logging
import os
import platform
import sys
import time
import warnings
from importlib import metadata

import numpy as np
import torch
from torch.func import functional_call, grad, jvp, linearize, vmap

HEAD = ("head.bias", "head.weight")
# In the order of `problem.flat`; kernels are (height, width, in, out) there.
NAMES = {
    "['body']['Conv_0']['bias']": "conv0.bias",
    "['body']['Conv_0']['kernel']": "conv0.weight",
    "['body']['Conv_1']['bias']": "conv1.bias",
    "['body']['Conv_1']['kernel']": "conv1.weight",
    "['body']['Dense_0']['bias']": "dense.bias",
    "['body']['Dense_0']['kernel']": "dense.weight",
    "['head']['bias']": "head.bias",
    "['head']['kernel']": "head.weight",
}


def to_torch(name, array):
    """Returns a leaf as PyTorch lays it out: channels first, and outputs before inputs."""
    if name.startswith("conv") and array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif name == "dense.weight":  # flattened (7, 7, 64) there, (64, 7, 7) here
        array = array.reshape(7, 7, 64, -1).transpose(3, 2, 0, 1).reshape(array.shape[1], -1)
    elif array.ndim == 2:
        array = array.T
    return torch.tensor(np.ascontiguousarray(array))


def from_torch(name, tensor):
    """Returns a leaf as JAX lays it out."""
    array = tensor.detach().numpy()
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if name == "dense.weight":
        return array.reshape(-1, 64, 7, 7).transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return array.T


class Problem:
    """The network with its weights, the data, and the direction to multiply with."""

    def __init__(self, path):
        arrays = np.load(path)
        self.damping = float(arrays["damping"])

        def tree(prefix):
            return {name: to_torch(name, arrays[prefix + key]) for key, name in NAMES.items()}

        self.params, self.direction = tree("['p']"), tree("['u']")
        self.model = torch.nn.Sequential(
            collections.OrderedDict(
                conv0=torch.nn.Conv2d(1, 32, 3, 2, 1),
                relu0=torch.nn.ReLU(),
                conv1=torch.nn.Conv2d(32, 64, 3, 2, 1),
                relu1=torch.nn.ReLU(),
                flatten=torch.nn.Flatten(),
                dense=torch.nn.Linear(3136, 128),
                relu2=torch.nn.ReLU(),
                head=torch.nn.Linear(128, 10),
            )
        )
        self.model.load_state_dict(self.params)
        self.loss = torch.nn.functional.cross_entropy
        self.train, self.group = (
            (
                torch.tensor(arrays[f"{name} images"].transpose(0, 3, 1, 2)).contiguous(),
                torch.tensor(arrays[f"{name} labels"]).long(),
            )
            for name in ("train", "group")
        )

    def names(self, part):
        """Returns the parameters of a part, "all" or "head", in the order of our vectors."""
        return HEAD if part == "head" else tuple(self.params)

    def select(self, tree, part):
        """Returns the leaves of a part, in the order in which the model has them."""
        wanted = self.names(part)
        return {name: tree[name] for name, _ in self.model.named_parameters() if name in wanted}

    def batch(self, size):
        """Returns the first training examples."""
        return tuple(x[:size] for x in self.train)

    def mean_loss(self, batch):
        """Returns the mean loss of a batch as a function of some of the parameters."""
        return lambda params: self.loss(
            functional_call(self.model, {**self.params, **params}, (batch[0],)), batch[1]
        )

    def losses(self, batch):
        """Returns the losses of a batch as a function of some of the parameters and the images."""
        return lambda params, images: self.loss(
            functional_call(self.model, {**self.params, **params}, (images,)),
            batch[1],
            reduction="none",
        )

    def group_gradient(self, part):
        """Returns the gradient of the mean loss of the group."""
        return grad(self.mean_loss(self.group))(self.select(self.params, part))

    def residual(self, part, solution):
        """Returns ||(H + damping) x - v|| / ||v|| over all training examples."""
        params, v = self.select(self.params, part), self.group_gradient(part)
        product = jvp(grad(self.mean_loss(self.train)), (params,), (solution,))[1]
        error = {k: product[k] + self.damping * solution[k] - v[k] for k in v}
        return float(norm(error) / norm(v))

    def unflatten(self, vector, part):
        """Returns a vector in the order of the model's parameters as a tree."""
        tree, start = {}, 0
        for name, leaf in self.select(self.params, part).items():
            tree[name] = vector.ravel()[start : start + leaf.numel()].reshape(leaf.shape)
            start += leaf.numel()
        return tree


def flatten(tree):
    """Returns a tree as one vector, as the libraries want it."""
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def dot(a, b):
    return sum(torch.sum(a[k] * b[k]) for k in a)


def norm(a):
    return torch.sqrt(dot(a, a))


def add(a, scale, b):
    return {k: a[k] + scale * b[k] for k in a}


# Tasks. Each returns {label: call}; a call returns a tree shaped like the parameters of its part, a
# vector in their order, or per-example results.


def torch_hvp(p, *, part, batch):
    gradient = grad(p.mean_loss(p.batch(batch)))
    params, u = p.select(p.params, part), p.select(p.direction, part)
    return {"torch.func": lambda: jvp(gradient, (params,), (u,))[1]}


def torch_hvp_fixed(p, *, part, batch):
    gradient = grad(p.mean_loss(p.batch(batch)))
    params, u = p.select(p.params, part), p.select(p.direction, part)
    product = linearize(gradient, params)[1]
    return {"torch.func.linearize": lambda: product(u)}


def torch_cg(p, *, part, tolerance, max_steps):
    params = p.select(p.params, part)

    def solve():
        gradient, v = grad(p.mean_loss(p.train)), p.group_gradient(part)
        x, r = {k: torch.zeros_like(leaf) for k, leaf in v.items()}, v
        direction, rr, target = v, dot(v, v), tolerance * norm(v)
        for step in range(max_steps):
            if torch.sqrt(rr) <= target:
                break
            q = add(jvp(gradient, (params,), (direction,))[1], p.damping, direction)
            alpha = rr / dot(direction, q)
            x, r = add(x, alpha, direction), add(r, -alpha, q)
            rr, previous = dot(r, r), rr
            direction = add(r, rr / previous, direction)
            solve.facts = {"products": step + 1}
        return x

    return {"torch.func": solve}


def torch_lissa(p, *, part, batch, steps, scale):
    params, v = p.select(p.params, part), p.group_gradient(part)

    def solve():
        h = v
        for _ in range(steps):
            index = torch.randint(len(p.train[1]), (batch,))
            chosen = tuple(x[index] for x in p.train)
            product = jvp(grad(p.mean_loss(chosen)), (params,), (h,))[1]
            h = add(add(v, 1 - p.damping / scale, h), -1 / scale, product)
        return {k: leaf / scale for k, leaf in h.items()}

    return {"torch.func": solve}


def torch_scores(p, *, part, batch):
    chosen = p.batch(batch)
    losses = p.losses(chosen)
    params, s = p.select(p.params, part), p.select(p.direction, part)

    def one(params, image, label):
        return p.mean_loss((image[None], label[None]))(params)

    few = list(zip(*(x.split(64) for x in chosen), strict=True))  # 1.7 MB of gradients each

    def from_gradients():
        found = []
        for each in few:
            gradients = vmap(grad(one), (None, 0, 0))(params, *each)
            found.append(-sum(gradients[k].flatten(1) @ s[k].ravel() for k in s))
        return torch.cat(found)

    return {
        "torch.func.jvp": lambda: -jvp(lambda q: losses(q, chosen[0]), (params,), (s,))[1],
        "torch.func, vmap of grad": from_gradients,
    }


def torch_pixel_maps(p, *, part, batch, dense_batch):
    del dense_batch
    chosen = p.batch(batch)
    losses = p.losses(chosen)
    params, s = p.select(p.params, part), p.select(p.direction, part)

    def total(images):
        return -jvp(lambda q: losses(q, images), (params,), (s,))[1].sum()

    return {"torch.func": lambda: grad(total)(chosen[0])}


def loader(batch, size):
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*batch), batch_size=size, shuffle=False
    )


def pydvl_restriction(p, part):
    wanted = p.names(part)
    return {name: x for name, x in p.model.named_parameters() if name in wanted}


def pydvl_hvp(p, *, part, batch):
    operators = importlib.import_module("pydvl.influence.torch.operator")
    data = loader(p.batch(batch), batch)
    operator = operators.HessianOperator(
        p.model, p.loss, data, restrict_to=pydvl_restriction(p, part)
    )
    u = flatten(p.select(p.direction, part))
    return {"pyDVL": lambda: operator.apply(u)}


def pydvl_cg(p, *, part, tolerance, max_steps):
    operators = importlib.import_module("pydvl.influence.torch.operator")

    def solve():
        operator = operators.HessianOperator(
            p.model, p.loss, loader(p.train, 512), restrict_to=pydvl_restriction(p, part)
        )
        v = flatten(p.group_gradient(part))
        # It stops at ||r|| < atol^2, whatever rtol asks for.
        atol = float((tolerance * torch.linalg.norm(v)) ** 0.5)
        solver = operators.CgOperator(
            operator, regularization=p.damping, rtol=1e-12, atol=atol, maxiter=max_steps
        )
        return solver.apply(v)

    return {"pyDVL": solve}


def pydvl_lissa(p, *, part, batch, steps, scale):
    operators = importlib.import_module("pydvl.influence.torch.operator")
    operations = importlib.import_module("pydvl.influence.torch.batch_operation")
    solver = operators.LissaOperator(
        operations.HessianBatchOperation(p.model, p.loss, restrict_to=pydvl_restriction(p, part)),
        loader(p.train, batch),
        regularization=p.damping,
        maxiter=steps,
        scale=scale,
        rtol=0.0,
        warn_on_max_iteration=False,
    )
    v = flatten(p.group_gradient(part))
    return {"pyDVL": lambda: solver.apply(v)}


def pydvl_provider(p, part):
    base = importlib.import_module("pydvl.influence.torch.base")
    provider = base.TorchGradientProvider(p.model, p.loss, pydvl_restriction(p, part))
    return provider, lambda batch: base.TorchBatch(*batch)


def pydvl_scores(p, *, part, batch):
    provider, as_batch = pydvl_provider(p, part)
    s = flatten(p.select(p.direction, part))
    chosen = as_batch(p.batch(batch))
    # The default forms all gradients: 1.7 MB an example for all parameters, so a few at a time.
    few = [as_batch(each) for each in zip(*(x.split(64) for x in p.batch(batch)), strict=True)]
    return {
        "pyDVL, Jacobian product": lambda: -provider.jacobian_prod(chosen, s[None])[0],
        "pyDVL, default": lambda: torch.cat([-(provider.flat_grads(each) @ s) for each in few]),
    }


def pydvl_pixel_maps(p, *, part, batch, dense_batch):
    if part == "all":
        return "its mixed derivative of all parameters takes 1.3 GB an image"
    provider, as_batch = pydvl_provider(p, part)
    s = flatten(p.select(p.direction, part))
    chosen = as_batch(p.batch(dense_batch))

    def maps():
        return -(provider.flat_mixed_grads(chosen) @ s)

    maps.items = dense_batch
    return {"pyDVL": maps}


def dattri_objective(p, part):
    """Returns the mean loss of a batch and the parameters, as dattri wants them: flat."""
    return lambda batch: lambda flat: p.mean_loss(batch)(p.unflatten(flat, part))


def dattri_hvp(p, *, part, batch):
    hessian = importlib.import_module("dattri.func.hessian")
    objective = dattri_objective(p, part)(p.batch(batch))
    flat, u = (flatten(p.select(tree, part)) for tree in (p.params, p.direction))
    product = hessian.hvp(objective, mode="rev-fwd")
    return {"dattri": lambda: product((flat,), u)}


def dattri_hvp_fixed(p, *, part, batch):
    hessian = importlib.import_module("dattri.func.hessian")
    objective = dattri_objective(p, part)(p.batch(batch))
    flat, u = (flatten(p.select(tree, part)) for tree in (p.params, p.direction))
    product = hessian.hvp_at_x(objective, (flat,))
    return {"dattri at_x": lambda: product(u)}


def dattri_cg(p, *, part, tolerance, max_steps):
    del tolerance  # it has none
    hessian = importlib.import_module("dattri.func.hessian")
    objective = dattri_objective(p, part)(p.train)
    flat = flatten(p.select(p.params, part))

    def solve():
        solver = hessian.ihvp_at_x_cg(objective, flat, max_iter=max_steps, regularization=p.damping)
        return solver(flatten(p.group_gradient(part)))

    return {"dattri": solve}


def dattri_lissa(p, *, part, batch, steps, scale):
    hessian = importlib.import_module("dattri.func.hessian")

    def objective(flat, index):
        chosen = tuple(x[index.long()] for x in p.train)
        return p.mean_loss(chosen)(p.unflatten(flat, part))

    flat, v = flatten(p.select(p.params, part)), flatten(p.group_gradient(part))
    index = torch.arange(len(p.train[1]), dtype=torch.float32)
    solver = hessian.ihvp_lissa(
        objective,
        batch_size=batch,
        recursion_depth=steps,
        damping=p.damping / scale,
        scaling=scale,
    )

    def solve():
        with torch.no_grad():  # or it keeps the graph of all steps
            return solver((flat, index), v, in_dims=(None, 0))

    return {"dattri": solve}


def captum_cg(p, *, part, tolerance, max_steps):
    del tolerance, max_steps  # it decomposes the Hessian
    if part == "all":
        return "it writes the Hessian out: 711 GB for all parameters"
    functions = importlib.import_module("captum.influence._core.influence_function")

    def solve():
        captum = functions.NaiveInfluenceFunction(
            p.model,
            loader(p.train, 512),
            checkpoint="",
            checkpoints_load_func=lambda model, path: 1.0,
            layers=["head"],
            loss_fn=torch.nn.CrossEntropyLoss(reduction="sum"),
            batch_size=512,
            sample_wise_grads_per_batch=True,
            projection_dim=None,
            hessian_reg=p.damping * len(p.train[1]),  # its Hessian is a sum over examples
        )
        return captum.influence(p.group)

    return {"captum, eigendecomposition and all influences": solve}


TASKS = {
    "torch.func": {
        "hvp": torch_hvp,
        "hvp_fixed": torch_hvp_fixed,
        "cg": torch_cg,
        "lissa": torch_lissa,
        "scores": torch_scores,
        "pixel_maps": torch_pixel_maps,
    },
    "pyDVL": {
        "hvp": pydvl_hvp,
        "cg": pydvl_cg,
        "lissa": pydvl_lissa,
        "scores": pydvl_scores,
        "pixel_maps": pydvl_pixel_maps,
    },
    "dattri": {
        "hvp": dattri_hvp,
        "hvp_fixed": dattri_hvp_fixed,
        "cg": dattri_cg,
        "lissa": dattri_lissa,
    },
    "captum": {"cg": captum_cg},
}


def our_layout(problem, part, answer):
    """Returns an answer flattened as ours is."""
    if isinstance(answer, torch.Tensor):
        size = sum(x.numel() for x in problem.select(problem.params, part).values())
        if answer.numel() != size:  # per example; images have channels first, but only one
            return answer.detach().numpy()
        answer = problem.unflatten(answer, part)
    leaves = [from_torch(name, answer[name]) for name in problem.names(part)]
    return np.concatenate([leaf.ravel() for leaf in leaves])


def prepare(problem, calls, command):
    library, task, settings = (command[key] for key in ("library", "task", "settings"))
    if task not in TASKS[library]:
        return {}
    try:
        found = TASKS[library][task](problem, **settings)
    except ImportError as error:
        return {"absent": str(error)}
    if isinstance(found, str):
        return {"absent": found}
    names = []
    for label, call in found.items():
        name = f"{task} {sorted(settings.items())}/{label}"
        calls[name] = (call, task, settings["part"])
        names.append(name)
    return {"names": names}


def answer(problem, calls, command):
    call, task, part = calls[command["name"]]
    result = call()
    facts = getattr(call, "facts", {})
    flat = our_layout(problem, part, result)
    np.save(command["path"], flat)
    items = getattr(call, "items", None)
    if task == "cg" and flat.ndim == 1:
        tree = problem.unflatten(result, part) if isinstance(result, torch.Tensor) else result
        facts = {**facts, "residual": problem.residual(part, tree)}
    return {"facts": facts, "items": items}


def sample(problem, calls, command):
    del problem
    call, _, _ = calls[command["name"]]
    start = time.perf_counter()
    for _ in range(command["repeats"]):
        call()
    return {"seconds": time.perf_counter() - start}


def versions(problem, calls, command):
    del problem, calls, command
    found = {"python": platform.python_version()}
    for name in ("torch", "pyDVL", "dattri", "captum", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


COMMANDS = {"prepare": prepare, "answer": answer, "sample": sample, "versions": versions}


def main():
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    problem, calls = Problem(sys.argv[1]), {}
    reply_to = sys.stdout
    for line in sys.stdin:
        command = json.loads(line)
        # What libraries print must not stand among the answers.
        with contextlib.redirect_stdout(sys.stderr):
            reply = COMMANDS[command["do"]](problem, calls, command)
        print(json.dumps(reply), file=reply_to, flush=True)


if __name__ == "__main__":
    main()
