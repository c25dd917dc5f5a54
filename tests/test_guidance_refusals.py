"""Guidance: wrong arguments are named when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import VPSDE, EpsModel, classifier_free_guided, classifier_guided, named_target
from tests.guided import assert_scores_agree


class Plain(nn.Module):
    num_classes = None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x


RING = named_target("ring")
VP = VPSDE()
MODEL = RING.model(VP)
SCORE, CLASSIFIER = RING.score_fn(VP), RING.classifier(VP)
NAN = math.nan
PAIR = torch.tensor([0, 8])


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: classifier_guided(SCORE, CLASSIFIER, 8), ValueError, r"label.*0\.\.7.*got 8"),
        (lambda: classifier_guided(SCORE, CLASSIFIER, -1), ValueError, r"label.*got -1"),
        (lambda: classifier_guided(SCORE, CLASSIFIER, PAIR), ValueError, r"label.*got 8"),
        (lambda: classifier_guided(SCORE, CLASSIFIER, None), ValueError, "label=None"),
        (lambda: classifier_guided(SCORE, CLASSIFIER, "a"), TypeError, "label must be an int"),
        (lambda: classifier_guided(SCORE, CLASSIFIER, 1, NAN), ValueError, "scale.*nan"),
        (lambda: classifier_guided(SCORE, CLASSIFIER, 1, math.inf), ValueError, "scale.*inf"),
        (lambda: classifier_guided(SCORE, CLASSIFIER, 1, "big"), TypeError, "scale.*'big'"),
        (lambda: classifier_free_guided(MODEL, 8), ValueError, r"label.*0\.\.7.*got 8"),
        (lambda: classifier_free_guided(MODEL, PAIR, 2.0), ValueError, r"label.*got 8"),
        (lambda: classifier_free_guided(MODEL, None), ValueError, "label=None"),
        (lambda: classifier_free_guided(MODEL, 1, NAN), ValueError, "scale.*nan"),
        (lambda: classifier_free_guided(MODEL, 1, -math.inf), ValueError, "scale.*inf"),
        (lambda: classifier_free_guided(MODEL, 1, 2.0, (2.0, 1.0)), ValueError, "interval"),
        (lambda: classifier_free_guided(MODEL, 1, 2.0, (1.0, 1.0)), ValueError, "interval"),
        (lambda: classifier_free_guided(MODEL, 1, 2.0, (-1.0, 1.0)), ValueError, "interval"),
        (lambda: classifier_free_guided(MODEL, 1, 2.0, (NAN, 1.0)), ValueError, "interval"),
        (lambda: classifier_free_guided(MODEL, 1, 1.0, (2.0, 1.0)), ValueError, "interval"),
        (lambda: classifier_free_guided(MODEL, 1, 2.0, rescale=1.5), ValueError, "rescale"),
        (lambda: classifier_free_guided(MODEL, 1, 2.0, rescale=-0.1), ValueError, "rescale"),
        (lambda: classifier_free_guided(MODEL, 1, 2.0, rescale=NAN), ValueError, "rescale"),
        (
            lambda: classifier_free_guided(EpsModel(Plain(), VP), 0, 2.0),
            ValueError,
            "class-conditional",
        ),
    ],
    ids=range(22),
)
def test_a_wrong_argument_is_named_at_construction(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def in_inference_mode() -> Tensor:
    with torch.inference_mode():
        labels = torch.tensor([0, 1])
        x, level = torch.zeros(2, 2), VP.at(0.3)
        return classifier_guided(SCORE, CLASSIFIER, labels)(x, level).score


def test_labels_made_in_inference_mode() -> None:
    expected = classifier_guided(SCORE, CLASSIFIER, torch.tensor([0, 1]))
    found = in_inference_mode()
    assert_scores_agree(found, expected(torch.zeros(2, 2), VP.at(0.3)).score)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: classifier_guided(SCORE, CLASSIFIER, 1, torch.tensor(NAN)), "scale.*nan"),
        (lambda: classifier_free_guided(MODEL, 1, torch.tensor([1.0, NAN])), "scale.*nan"),
        (lambda: classifier_free_guided(MODEL, 1, torch.ones(2, 2)), r"scale.*\(2, 2\)"),
        (lambda: classifier_free_guided(MODEL, 1, 2.0, (1.0,)), "interval"),  # type: ignore[arg-type]
        (lambda: classifier_free_guided(MODEL, 1, 2.0, 1.0), "interval"),  # type: ignore[arg-type]
        (lambda: classifier_free_guided(MODEL, 1, 2.0, rescale="a"), "rescale"),  # type: ignore[arg-type]
    ],
    ids=range(6),
)
def test_tensors_and_tuples_are_checked_too(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
