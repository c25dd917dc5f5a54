"""Which solvers are certified: the catalogue in several settings, or those the user names."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from experiments.spec import Component, parse_solver, spec_of
from solvers import Integrator, Solver, catalogue
from solvers.adapters.diffusers_ import PREFIX, SCHEDULERS
from solvers.catalogue import peers as catalogued_peers

# Settings given by name that choose the method, and with it the order; what can be found out
# (whole orders, choices, eta) is not listed.
_METHODS: dict[str, dict[str, tuple[Any, ...]]] = {
    "probability_flow": {"method": ("euler", "midpoint", "heun", "rk4")},
    "torchsde_sde": {"method": ("srk", "euler", "milstein")},
    "torchdiffeq_ode": {
        "method": ("dopri5", "bosh3", "dopri8", "euler", "midpoint", "heun2", "heun3", "rk4")
    },
    "scipy_ode": {"method": ("RK45", "RK23", "DOP853", "LSODA")},
}
_HIGHEST_ORDER = 8
_PEERS_HIGHEST_ORDER = 3


@dataclass(frozen=True)
class Candidate:
    """A solver to certify, and the name by which it goes."""

    name: str
    solver: Solver | Integrator


def make_candidates(
    texts: Sequence[str], *, quick: bool = False, peers: bool = False
) -> list[Candidate]:
    """What ``--solver`` names, or, for none, the whole catalogue (``quick``: default settings);
    with ``peers`` also diffusers' schedulers.

    Raises:
        ValueError: a name that does not exist, a module that does not import, settings that do not
            fit; peers where diffusers is not installed.
    """
    if texts:
        found = [named_candidate(text) for text in texts]
    else:
        found = catalogue_candidates(quick=quick)
    if peers:
        found += peer_candidates(quick=quick)
    return list({candidate.name: candidate for candidate in found}.values())


def named_candidate(text: str, argument: str = "--solver") -> Candidate:
    """``NAME[:settings]`` of the catalogue, or ``package.module:Name[:settings]``."""
    solver = parse_solver(text, argument)
    return Candidate(spec_of(solver), solver)


def catalogue_candidates(*, quick: bool = False) -> list[Candidate]:
    """Every solver: default settings, every order there is, every choice, eta 0 and 1."""
    candidates = []
    for name, entry in catalogue().items():
        if entry.kind == "corrector":
            continue
        variants: list[dict[str, Any]] = [{}] if quick else _variants(name, entry.type)
        made: list[Any] = []
        for settings in variants:
            solver = _made(entry.type, settings)
            if solver is not None and solver not in made:
                made.append(solver)
        candidates += [Candidate(spec_of(solver), solver) for solver in made]
    return candidates


def peer_candidates(*, quick: bool = False) -> list[Candidate]:
    """Every scheduler of diffusers that there is an adapter to: in default settings, and, unless
    ``quick``, in every order, on the times of Karras et al. where it has them: its default times
    are even in t, which leaves a last step in log-SNR that hardly shrinks."""
    entries = catalogued_peers()
    if not entries:
        raise ValueError(
            "--peers needs diffusers: install the extra 'peers', pip install 'sde-diffusion[peers]'"
        )
    candidates = []
    for name, entry in entries.items():
        order = SCHEDULERS[name.removeprefix(PREFIX)].order
        times = {"use_karras_sigmas": True} if "use_karras_sigmas" in entry.settings else {}
        variants: list[dict[str, Any]] = [times]
        if isinstance(order, str):
            variants = [{**times, order: k} for k in range(1, _PEERS_HIGHEST_ORDER + 1)]
        for settings in [{}, *([] if quick else variants)]:
            solver: Any = _made(entry.type, settings)
            if solver is not None:
                candidates.append(Candidate(spec_of(solver), solver))
    return list({candidate.name: candidate for candidate in candidates}.values())


def _variants(name: str, kind: Any) -> list[dict[str, Any]]:
    """Settings to try, the defaults first."""
    choices: dict[str, tuple[Any, ...]] = dict(_METHODS.get(name, {}))
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
        if item.name == "order":
            choices["order"] = tuple(range(1, _HIGHEST_ORDER + 1))
        elif item.name == "eta":
            choices["eta"] = (0.0, 1.0)
        elif typing.get_origin(hints.get(item.name)) is Literal:
            choices[item.name] = typing.get_args(hints[item.name])
    keys = list(choices)
    combined = [dict(zip(keys, values, strict=True)) for values in product(*choices.values())]
    # Without noise the ways to scale it are one.
    return [{}, *(c for c in combined if c.get("eta") != 0 or c.get("variance") != "large")]


def _made(kind: Any, settings: dict[str, Any]) -> Component | None:
    """The solver, or ``None`` where the settings do not exist (an order too high)."""
    try:
        solver: Component = kind(**settings)
    except ValueError:
        return None
    return solver
