"""The Python in README and CONTRIBUTING runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import VPSDE, named_target
from solvers import sample
from tests.problems import warped_grid

ROOT = Path(__file__).parent.parent


class MyUNet(nn.Module):
    """Stands in for the reader's own class-conditional network."""

    num_classes = 10
    null_label = 10

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return 0.1 * x * (1 + t + label).reshape(-1, 1, 1, 1)


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {"MyUNet": MyUNet, "__name__": "document"}
    exec(compile(block, "document", "exec"), names)  # the documents' own code
    return names


@pytest.mark.parametrize("number", range(2))
def test_readme(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = python_blocks("README.md")
    assert len(blocks) == 2
    names = run(blocks[number])
    printed = capsys.readouterr().out
    if number == 0:
        assert "torch.Size([16, 3, 32, 32]) 40 80" in printed
    else:
        # Euler at 50 steps on ring, whose standard deviation is 1.005; at most 5 % off.
        x = sample(
            named_target("ring").score_fn(VPSDE()),
            VPSDE(),
            names["EulerODE"](),
            shape=(1000, 2),
            steps=50,
        ).x
        assert torch.allclose(x.std(0), torch.full((2,), 1.005), rtol=0.05)


def test_contributing_solver_has_the_order_it_declares() -> None:
    (block,) = python_blocks("CONTRIBUTING.md")
    solver = run(block)["TwoStep"]()
    sde = VPSDE()
    score_fn = named_target("gaussian").score_fn(sde)
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(8, 2)

    def end(steps: int) -> Tensor:
        return sample(score_fn, sde, solver, x=x, grid=warped_grid(sde, steps)).x

    errors = [float((end(n) - end(4 * n)).norm()) for n in (100, 200, 400)]
    # Differences of a method of order p with one on a grid four times finer fall like n^-p.
    assert 1.75 < torch.tensor(errors).log2().diff().neg().mean() < 2.25
    assert solver.order == 2


def test_ito_document(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = python_blocks("docs/ito.md")
    names = run(block)
    # Gamma laws of mean 0.16 and 2.0 in equal parts; 1,000 samples, five standard errors of 0.05.
    for name, mean in (("reverse", 1.08), ("flow", 1.08), ("one", 2.0)):
        assert abs(float(names[name].x.mean()) - mean) < 0.25
    assert capsys.readouterr().out.endswith(" 200\n")
