"""A training config: every key reaches the run, mistakes are named, what is printed reads back."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from experiments.training import TrainOptions, run_train, sample_sheet, training_config
from sde_diffusion import TabulatedVPSDE, VModel
from sde_diffusion.checkpoints import describe, load_model
from sde_diffusion.parametrization import TableIndex
from sde_diffusion.training import RunOptions, train
from sde_diffusion.training_config import (
    RunTable,
    TrainConfig,
    completed,
    noise_scales_chosen,
    override,
    parse_config,
    to_toml,
)
from sde_diffusion.training_settings import TrainSettings
from tests.trained import points

SMALL = """
[score]
steps = 4
batch_size = 8
[classifier]
steps = 2
batch_size = 8
[judge]
steps = 2
batch_size = 8
"""


@pytest.mark.parametrize(
    "text, message",
    [
        ("[score]\nstepz = 3", r"c.toml: unknown key in \[score\] 'stepz'. Did you mean 'steps'"),
        ("[scor]\nsteps = 3", "c.toml: unknown table 'scor'. Did you mean 'score'"),
        ('[score]\nsteps = "3"', r"c.toml: \[score\] steps: .*integer, got '3'"),
        ("[score]\nsteps = 3.5", r"\[score\] steps: .*got 3.5"),
        ("[score]\nsteps = true", r"\[score\] steps: .*got True"),
        ("[score]\nsteps = 0", r"\[score\] steps must be at least 1, got 0"),
        ("[run]\ntrackers = [1]", r"\[run\] trackers.0: .*string, got 1"),
        ("[run]\nkeep_last = 0", "keep_last must be at least 1"),
        ('[run]\nmixed_precision = "bf15"', "Did you mean 'bf16'"),
        ("[model]\np_uncond = 2", r"p_uncond must lie in \[0, 1\], got 2"),
        ("[data]\nsource = 1979-01-01", "a value is of a kind that no key takes"),
        ("score = 3", r"\[score\] must be a table"),
        ("[score\n", "c.toml is not TOML"),
        ('[sde]\nkind = "vx"', "Did you mean 'vp'"),
        ("[sde]\nbeta_mx = 3.0", r"unknown key in \[sde\] 'beta_mx'. Did you mean 'beta_max'"),
        ('[sde]\nkind = "vp"\nbeta_max = "x"', r"\[sde\] beta_max: .*got 'x'"),
        ('[sde]\nkind = "ddpm"\nT = 1', "T must be at least 2, got 1"),
        ('[sde]\nkind = "vp"\nsigma_max = "auto"', "sigma_max is no key of kind 'vp'"),
        ('[network]\nkind = "mpl"', "Did you mean 'mlp'"),
        ("[network]\nwidht = 3", "unknown setting of network 'mlp' 'widht'. Did you mean 'width'"),
        ("[network]\nnum_classes = 3", "num_classes of a network is the data's"),
        ('[objective]\nname = "simpl"', "Did you mean 'simple'"),
        ('[objective]\nname = "min_snr"\ngama = 5', "Did you mean 'gamma'"),
        ('[model]\nparametrization = "epss"', "Did you mean 'eps'"),
        ('[model]\ntime_label = "table_index"', "needs a discrete chain"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    def whole() -> None:
        config = parse_config(text, "c.toml")
        config.check_sde()
        completed(config, points())

    with pytest.raises(ValueError, match=message):
        whole()


def test_labels_that_a_recipe_needs_and_the_data_has_not() -> None:
    for key in ("conditional", "with_classifier"):
        config = parse_config(f"[model]\n{key} = true", "c.toml")
        with pytest.raises(ValueError, match=f"{key}=true.* needs labels, and data 'points'"):
            completed(config, points(classes=None))


@pytest.mark.parametrize(
    "text",
    [
        "",
        '[sde]\nkind = "ve"\nsigma_max = 7.5',
        '[sde]\nkind = "ddpm"\nT = 20\nbeta_T = 0.3\n[model]\ntime_label = "table_index"',
        '[network]\nkind = "mlp"\nwidth = 24\n[model]\nparametrization = "v"',
        '[objective]\nname = "min_snr"\ngamma = 3.0\n[run]\ntrackers = ["tensorboard"]',
    ],
)
def test_what_is_printed_reads_back_and_is_complete(text: str) -> None:
    full = completed(parse_config(text, "c.toml"), points())
    again = parse_config(to_toml(full), "printed")
    assert again == full
    assert completed(again, points()) == full
    assert full.network["kind"] == "mlp"
    assert full.objective["name"]
    assert full.model.parametrization
    # What was left open trains as what was filled in.
    assert full.make_sde() == parse_config(text, "c.toml").make_sde()


def test_the_completed_config_trains_the_same_weights(tmp_path: Path) -> None:
    for kind in ("vp", "ve"):
        config = parse_config(f'[sde]\nkind = "{kind}"\n{SMALL}', "c.toml")
        for name, used in (("open", config), ("full", completed(config, points()))):
            train(
                points(),
                used.make_sde(),
                tmp_path / f"{kind}-{name}",
                settings=used.settings(),
                progress=False,
            )
        open_, full = (load_model(tmp_path / f"{kind}-{name}") for name in ("open", "full"))
        for a, b in zip(open_.model.parameters(), full.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_network_by_its_size() -> None:
    from sde_diffusion.networks import build_network

    config = parse_config('[network]\nsize = "tiny"\nkind = "dit"', "c.toml")
    full = completed(config, points((1, 8, 8)))
    assert full.network["kind"] == "dit"
    assert "size" not in full.network
    net = build_network({**full.network, "event_shape": [1, 8, 8], "num_classes": 2})
    assert 300_000 < sum(p.numel() for p in net.parameters()) < 700_000


def test_overriding_a_key() -> None:
    config = override(TrainConfig(), "network.channels=[64,128]")
    assert config.network == {"channels": [64, 128]}
    assert override(config, "score.learning_rate = 1e-4").score.learning_rate == 1e-4
    assert override(config, "sde.kind=edm").sde == {"kind": "edm"}  # no other kind's settings
    assert override(config, "run.out=runs/a b").run.out == "runs/a b"
    for wrong, message in (
        ("score.stepz=1", r"--set score.stepz=1: unknown key in \[score\] 'stepz'"),
        ("steps=1", "takes table.key=value"),
        ("score.steps", "takes table.key=value"),
        ("score.steps=many", "got 'many'"),
    ):
        with pytest.raises(ValueError, match=message):
            override(config, wrong)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[sde]\nkind = "vp"\nbeta_max = 9.0\n[run]\nseed = 3\n' + SMALL)
    config = training_config(TrainOptions(str(file)))
    assert (config.run.seed, config.sde["beta_max"], config.run.out) == (3, 9.0, "runs/mine")
    config = training_config(
        TrainOptions(
            str(file), sde="ve", seed=5, steps=8, out="x", assignments=["score.batch_size=2"]
        )
    )
    assert config.sde == {"kind": "ve"}
    assert (config.run.seed, config.run.out) == (5, "x")
    assert (config.score.steps, config.classifier.steps, config.judge.steps) == (8, 4, 4)
    assert config.score.batch_size == 2
    with pytest.raises(ValueError, match="--sigma-max must be a number or auto"):
        training_config(TrainOptions("digits", sde="ve", sigma_max="much"))


def test_every_key_of_settings_and_options_can_be_set() -> None:
    """A key added to one and forgotten in the other would be silently without effect."""
    known = {f.name for f in fields(RunOptions)} - {"config"}
    assert known | {"seed", "out", "mixed_precision", "accumulate"} == {
        f.name for f in fields(RunTable)
    }
    assert RunOptions(config=to_toml(TrainConfig())) == TrainConfig().options()
    assert TrainSettings() == TrainConfig().settings()


def test_a_discrete_chain_with_integer_labels_is_trained_stored_and_loaded(tmp_path: Path) -> None:
    text = '[sde]\nkind = "ddpm"\nT = 25\nbeta_T = 0.3\n[model]\ntime_label = "table_index"\n'
    config = completed(parse_config(text + SMALL, "c.toml"), points())
    assert config.objective == {"name": "discrete_simple"}
    train(points(), config.make_sde(), tmp_path / "m", settings=config.settings(), progress=False)
    loaded = load_model(tmp_path / "m")
    assert isinstance(loaded.sde, TabulatedVPSDE)
    assert loaded.model.time_label == TableIndex(25)
    assert len(loaded.sde.betas) == 25
    label = loaded.model.time_label(loaded.sde.at(loaded.sde.times))
    assert label.tolist() == list(range(25))


def test_sigma_max_from_the_data() -> None:
    config = parse_config('[sde]\nkind = "ve"\nsigma_max = "auto"', "c.toml")
    config.check_sde()
    data = points()
    chosen, derivation = noise_scales_chosen(config, data)
    assert chosen.sde["sigma_max"] == pytest.approx(float(torch.pdist(data.train_x[:]).max()))
    assert "largest of all pairwise distances" in derivation
    assert noise_scales_chosen(TrainConfig(), data) == (TrainConfig(), "")


def test_a_run_from_a_file_with_all_that_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    text = SMALL.replace("batch_size = 8", "batch_size = 1500", 1)  # more than there are samples
    Path("mine.toml").write_text(
        '[model]\nparametrization = "v"\nconditional = false\n'
        + text
        + '[run]\nout = "m"\nsamples_every = 2\nvalidate_every = 2\nlog_every = 1\n'
        'trackers = ["tensorboard"]\n'
    )
    run_train(TrainOptions("mine.toml", assignments=["network.channels=[8]"]))
    printed = capsys.readouterr().out
    assert 'parametrization = "v"' in printed
    assert 'schedule = "cosine"' in printed  # defaults too
    assert "held-out data, by time" in printed
    loaded = load_model("m")
    assert isinstance(loaded.model, VModel)
    assert loaded.null_label is None  # unconditional, though there are labels:
    assert loaded.classifier is not None
    assert describe("m")["networks"]["score"]["channels"] == [8]
    stored = Path("m/config.toml").read_text()
    assert stored == loaded.training["config"]
    assert stored.strip() in printed
    assert [file.name for file in sorted(Path("m/samples").iterdir())] == [
        "0000002.png",
        "0000004.png",
    ]
    assert list(Path("m/logs").rglob("events.out.tfevents*"))
    # The stored config is a config: the same run, finished.
    run_train(TrainOptions("m/config.toml", resume=True))


def test_a_sheet_of_points_is_a_scatter(tmp_path: Path) -> None:
    config = parse_config(SMALL, "c.toml")
    data = points()
    options = RunOptions(samples_every=4)
    train(
        data,
        config.make_sde(),
        tmp_path / "m",
        settings=config.settings(),
        options=options,
        sheet=sample_sheet(data, 0),
        progress=False,
    )
    picture = tmp_path / "m" / "samples" / "0000004.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
