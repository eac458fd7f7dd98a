"""explanation.html and explanation.json of an `Explanation`, in the style of the report."""

import json
import math
from typing import Any

import numpy as np

from jaxpoison.audit.findings import thumbnail
from jaxpoison.audit.report import page_environment, policy
from jaxpoison.data.pixels import to_uint8

_TITLES = {
    "as_is": "On all images",
    "without": "Without the named images",
    "random": "Without as many others of the same labels, at random",
}
_METHODS = {"refit": "New last layers", "retrained": "New small networks, from scratch"}


def html(explanation: Any) -> str:
    """Returns the page: it opens from disk and fetches nothing.

    Raises:
      ImportError: without Jinja2 (extra `audit`).
    """
    environment, style, script = page_environment("explanation")
    columns = explanation.columns()
    shown = len(explanation.maps)
    names = explanation.class_names
    return environment.get_template("explanation.html.jinja").render(
        style=style,
        policy=policy(style, script),
        picture=thumbnail(_rgb(explanation.image)),
        prediction=names[explanation.prediction],
        prediction_share=float(explanation.probabilities[explanation.prediction]),
        wanted=names[explanation.wanted],
        wanted_share=float(explanation.probabilities[explanation.wanted]),
        explanation=explanation,
        headline=_headline(explanation),
        removals=[
            {
                "method": _METHODS[one.method],
                "title": _TITLES[one.name],
                "record": one,
                "trainings": len(one.predictions),
                "probability": float(np.mean(one.probability)),
                "accuracy": _mean(one.accuracy),
            }
            for one in explanation.removals
        ],
        causes=[
            {
                **{name: values[place] for name, values in columns.items()},
                "picture": thumbnail(_rgb(explanation.top[place])),
                "map": thumbnail(_map_picture(explanation.maps[place])),
            }
            for place in range(shown)
        ],
        has_accuracy=any(_mean(one.accuracy) is not None for one in explanation.removals),
    )


def as_json(explanation: Any) -> str:
    """Returns explanation.json: what was predicted, the removals, and the named images."""
    names, columns = explanation.class_names, explanation.columns()
    value = {
        "prediction": names[explanation.prediction],
        "wanted": names[explanation.wanted],
        "wanted_given": explanation.wanted_given,
        "probabilities": dict(zip(names, explanation.probabilities.tolist(), strict=True)),
        "num_causes": explanation.num_causes,
        "is_enough": explanation.is_enough,
        "causes": [
            {name: values[place] for name, values in columns.items() if name != "named"}
            for place in range(explanation.num_causes)
        ],
        "removals": [
            {
                "name": one.name,
                "method": one.method,
                "num_removed": one.num_removed,
                "predictions": [names[label] for label in one.predictions],
                "probability": one.probability.tolist(),
                "accuracy": None if _mean(one.accuracy) is None else one.accuracy.tolist(),
                "changed": one.changed,
                "interval": list(one.interval),
            }
            for one in explanation.removals
        ],
    }
    return json.dumps(value, indent=1) + "\n"


def _headline(explanation: Any) -> str:
    """Returns the answer in one sentence."""
    count = explanation.num_causes
    images = "training image" if count == 1 else f"{count:,} training images"
    if not explanation.is_enough:
        return f"The prediction stands without the {images} that speak for it most."
    control = next(one for one in explanation.removals if one.name == "random")
    if control.changed > len(control.predictions) / 2:
        return (
            f"The prediction changes without {'this' if count == 1 else 'these'} {images}, but "
            "also without others at random: it hangs by a thread, and nothing is proven."
        )
    return (
        f"Without {'this' if count == 1 else 'these'} {images} the prediction changes; without as "
        "many others it stands."
    )


def _mean(values):
    mean = float(np.mean(values))
    return None if math.isnan(mean) else mean


def _rgb(image):
    """Returns uint8 [H, W, 3]."""
    image = to_uint8(image)
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def _map_picture(pixels):
    """Returns uint8 [H, W, 3]: white is 0, red positive, blue negative."""
    total = np.asarray(pixels).sum(axis=-1)
    scale = np.quantile(np.abs(total), 0.99)
    level = np.clip(total / (scale if scale > 0 else 1), -1, 1)[..., None]
    colors = np.where(level > 0, (165, 40, 31), (31, 79, 143))
    return np.round(255 + np.abs(level) * (colors - 255)).astype(np.uint8)
