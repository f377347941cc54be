"""Models: any shape of data, equal weights from equal seeds, initialization and freezing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from running import skip_in_a_project
from torch import nn
from torch.nn import functional

from lab.models.freezing import freeze
from lab.models.initialisation import SCHEMES, apply, start_from_data
from regrow.config.targets import locate
from regrow.config.yaml_files import read_yaml
from regrow.distributed.parallel import synchronise_batch_norm
from regrow.errors import UserError
from regrow.project import CONF

torch.set_num_threads(1)


def shipped(name: str) -> dict[str, Any]:
    """Return the content of `conf/model/<name>.yaml`."""
    file = CONF / "model" / f"{name}.yaml"
    if not file.is_file():
        skip_in_a_project(f"conf/model/{name}.yaml is not there")
    return read_yaml(file)


def made(
    name: str, input_shape: list[int], num_outputs: int = 3, *, seed: int = 0, **changed: Any
) -> nn.Module:
    node = shipped(name) | {"input_shape": input_shape, "num_outputs": num_outputs}
    small = {"width": 24, "depth": 2} if name == "vit" else {}
    factory = locate(node.pop("_target_"), "model")
    torch.manual_seed(seed)
    model: nn.Module = factory(**node | small | changed)
    return model


SHAPES = [[1, 8, 8], [3, 32, 32], [4, 28, 28], [2, 96, 96]]


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18", "vit"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_fits_channels_size_and_outputs_and_every_weight_learns(
    name: str, shape: list[int]
) -> None:
    model = made(name, shape, 5, **({"init": "xavier"} if name == "vit" else {}))
    outputs = model(torch.randn(2, *shape))
    assert outputs.shape == (2, 5)
    outputs.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_resnet50_fits_too() -> None:
    assert made("resnet50", [1, 8, 8], 1)(torch.randn(2, 1, 8, 8)).shape == (2, 1)


@pytest.mark.parametrize("shape", [[30], [3, 4], [1, 8, 8]])
@pytest.mark.parametrize("hidden", [[], [16], [16, 8]])
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_an_mlp_takes_tables_and_images(shape: list[int], hidden: list[int], norm: str) -> None:
    model = made("mlp", shape, 1, hidden=hidden, norm=norm, dropout=0.1, activation="gelu")
    assert model(torch.randn(4, *shape)).shape == (4, 1)


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
def test_a_cnn_takes_rectangles(norm: str) -> None:
    model = made("cnn", [2, 8, 19], norm=norm, channels=[6, 12, 24, 48], dropout=0.1)
    assert model(torch.randn(2, 2, 8, 19)).shape == (2, 3)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18", "vit"])
@pytest.mark.parametrize("init", ["default", "orthogonal"])
def test_the_seed_alone_decides_the_weights(name: str, init: str) -> None:
    one, two = (made(name, [1, 8, 8], init=init).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = made(name, [1, 8, 8], seed=1, init=init).state_dict()
    assert any(not torch.equal(one[key], other[key]) for key in one)


def photographs(count: int = 200) -> torch.Tensor:
    """Images (count, 3, 12, 12) whose neighbouring pixels and channels are similar."""
    noise = torch.randn(count, 3, 13, 13, generator=torch.Generator().manual_seed(0))
    smooth = noise[:, :, 1:, 1:] + noise[:, :, :-1, 1:] + noise[:, :, 1:, :-1]
    return smooth + 2 * smooth.mean(1, keepdim=True)


def covariance_of(filtered: torch.Tensor) -> torch.Tensor:
    rows = filtered.transpose(0, 1).flatten(1)
    return rows @ rows.T / rows.shape[1]


@pytest.mark.parametrize("shape", [[1, 9, 9], [3, 32, 32], [2, 9, 19]])
def test_all_but_filters_and_scales_of_a_whitened_cnn_learn(shape: list[int]) -> None:
    model: Any = made("whitened_cnn", shape, 5)
    outputs = model(torch.randn(4, *shape))
    assert outputs.shape == (4, 5)
    outputs.square().sum().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None}
    norms = {f"stages.{stage}.norm{number}.weight" for stage in range(3) for number in (1, 2)}
    assert still == {"whiten.weight"} | norms
    one = made("whitened_cnn", shape, 5).state_dict()
    assert all(torch.equal(one[name], value) for name, value in made(
        "whitened_cnn", shape, 5
    ).state_dict().items())  # fmt: skip


@pytest.mark.slow
@pytest.mark.nightly
def test_the_largest_values_have_a_finite_gradient_when_compiled_in_bf16() -> None:
    shipped("whitened_cnn")  # skips the test in a project without it
    from lab.models.whitened_cnn import largest

    inputs = torch.randn(8, 4, 3, 3).bfloat16().requires_grad_()
    outputs = torch.compile(lambda values: largest(functional.gelu(values)))(inputs)
    outputs.sum().backward()
    assert torch.equal(outputs, functional.gelu(inputs).amax((2, 3)))
    assert inputs.grad is not None and inputs.grad.isfinite().all()


def test_a_whitened_cnn_takes_its_settings() -> None:
    model: Any = made("whitened_cnn", [3, 32, 32], 1000, norm_momentum=0.25, freeze=["stages.0"])
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.25}
    assert not any(p.requires_grad for p in model.stages[0].parameters())
    assert model.stages[1].conv1.weight.requires_grad
    assert model.head.weight.std().item() == pytest.approx(1 / 256, rel=0.01)
    one_output: Any = made("whitened_cnn", [3, 32, 32], 1, channels=[4, 4, 1])
    assert one_output.head.weight.isfinite().all()


def test_the_first_layer_takes_patches_apart_into_directions_of_equal_variance() -> None:
    model: Any = made("whitened_cnn", [3, 12, 12])
    before = covariance_of(model.whiten(photographs()))[:12, :12]
    assert not torch.allclose(before, torch.eye(12), atol=0.5)
    start_from_data(model, photographs())
    filtered = model.whiten(photographs())
    assert torch.allclose(covariance_of(filtered)[:12, :12], torch.eye(12), atol=0.01)
    assert torch.equal(filtered[:, 12:], -filtered[:, :12])
    assert not model.whiten.weight.requires_grad
    # Directions without variance are not amplified: two of three channels are redundant.
    start_from_data(model, photographs()[:, :1].expand(-1, 3, -1, -1))
    assert model.whiten.weight.abs().max() < 1 / 5e-4**0.5 + 1
    assert covariance_of(model.whiten(photographs()[:, :1].expand(-1, 3, -1, -1))).max() < 1.01


class Standardised(nn.Module):
    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.wrong = wrong
        self.mean = nn.Parameter(torch.zeros(3))

    def initialize_from(self, inputs: torch.Tensor) -> None:
        self.mean.copy_(inputs.mean((0, 2, 3)))
        if self.wrong == "new":
            self.scale = nn.Parameter(inputs.std((0, 2, 3)))
        if self.wrong == "shape":
            self.mean = nn.Parameter(torch.zeros(4))
        if self.wrong == "gone":
            del self.mean
        if self.wrong == "nan":
            self.mean[1] = torch.nan


def test_a_model_that_starts_from_data_holds_what_it_held_before() -> None:
    model = Standardised()
    start_from_data(model, photographs())
    torch.testing.assert_close(model.mean.detach(), photographs().mean((0, 2, 3)))
    assert model.mean.requires_grad
    cases = {"new": "of scale", "shape": "of mean", "gone": "of mean", "nan": "mean with values"}
    for wrong, says in cases.items():
        with pytest.raises(UserError, match=rf"initialize_from .*{says}"):
            start_from_data(Standardised(wrong), photographs())


def test_the_sign_of_a_filter_does_not_hang_on_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    def filters() -> torch.Tensor:
        model: Any = made("whitened_cnn", [3, 12, 12])
        start_from_data(model, photographs())
        weight: torch.Tensor = model.whiten.weight.detach()
        return weight

    before, eigh = filters(), torch.linalg.eigh
    turned = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(6)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (eigh(m)[0], eigh(m)[1] * turned))
    torch.testing.assert_close(filters(), before)


def test_a_stage_starts_by_passing_its_input_on() -> None:
    model: Any = made("whitened_cnn", [3, 12, 12], channels=[30, 40, 40])
    inputs = torch.randn(2, 24, 12, 12)
    passed = model.stages[0].conv1(inputs)
    torch.testing.assert_close(passed[:, :24], inputs)
    assert not torch.allclose(passed[:, 24:30], inputs[:, :6])


def test_views_are_averaged_outside_of_training_alone() -> None:
    inputs = photographs(8)
    one: Any = made("whitened_cnn", [3, 12, 12], views="one").eval()
    mirror = made("whitened_cnn", [3, 12, 12], views="mirror").eval()
    shift = made("whitened_cnn", [3, 12, 12], views="mirror_shift").eval()
    padded = torch.nn.functional.pad(inputs, (1, 1, 1, 1), mode="reflect")
    shifted = [padded[:, :, :12, :12], padded[:, :, 2:, 2:]]
    both = [(one(x) + one(x.flip(3))) / 2 for x in (inputs, *shifted)]
    torch.testing.assert_close(mirror(inputs), both[0])
    torch.testing.assert_close(shift(inputs), both[0] / 2 + both[1] / 4 + both[2] / 4)
    assert not torch.allclose(one(inputs), both[0], atol=1e-4)
    assert not torch.allclose(shift(inputs), both[0], atol=1e-4)
    torch.testing.assert_close(shift.train()(inputs), one.train()(inputs))


def test_small_images_keep_their_resolution_in_a_resnet() -> None:
    small: Any = made("resnet18", [3, 32, 32])
    assert small.conv1.stride == (1, 1) and isinstance(small.maxpool, nn.Identity)
    large: Any = made("resnet18", [1, 96, 96])
    assert large.conv1.stride == (2, 2) and large.conv1.in_channels == 1


def test_a_zero_residual_starts_each_block_as_the_identity() -> None:
    for init in ("default", "he"):
        model: Any = made("resnet18", [3, 32, 32], zero_init_residual=True, init=init)
        assert all((block.bn2.weight == 0).all() for block in model.layer1)
    plain: Any = made("resnet18", [3, 32, 32])
    assert not (plain.layer1[0].bn2.weight == 0).any()


@pytest.mark.parametrize(
    ("size", "patch"), [(8, 2), (28, 4), (32, 4), (64, 8), (96, 8), (224, 16), (10, 2), (25, 5)]
)
def test_patches_fit_the_image(size: int, patch: int) -> None:
    model: Any = made("vit", [1, size, size])
    assert model.patch_size == patch


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_init_scheme_has_its_known_statistics(scheme: str) -> None:
    model = nn.Sequential(nn.Conv2d(16, 256, 3), nn.Linear(512, 512), nn.LayerNorm(512))
    torch.manual_seed(0)
    apply(model, scheme)
    weight: torch.Tensor = model[1].weight
    expected = {"he": 2 / 512, "kaiming": 2 / 512, "xavier": 1 / 512, "orthogonal": 1 / 512}
    spread = expected.get(scheme, (0.02 * 0.88) ** 2)
    assert weight.var().item() == pytest.approx(spread, rel=0.05)
    assert (model[0].bias == 0).all() and (model[2].weight == 1).all()
    if scheme == "orthogonal":
        torch.testing.assert_close(weight @ weight.T, torch.eye(512), atol=1e-4, rtol=0)


def test_an_init_scheme_reaches_attention() -> None:
    before = nn.MultiheadAttention(64, 4)
    after = copy.deepcopy(before)
    apply(after, "orthogonal")
    assert not torch.equal(before.in_proj_weight, after.in_proj_weight)
    query = after.in_proj_weight[:64]
    torch.testing.assert_close(query @ query.T, torch.eye(64), atol=1e-4, rtol=0)


def test_frozen_parts_do_not_move_and_the_rest_does() -> None:
    model: Any = made("cnn", [1, 8, 8], freeze=["body.[01]"])
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()
        model(torch.randn(4, 1, 8, 8)).square().sum().backward()
        optimizer.step()
    after = model.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved and all(key.startswith(("body.2", "body.3", "body.4", "head")) for key in moved)
    assert "body.2.1.running_mean" in moved  # and a norm that is not frozen still counts


def test_frozen_norms_stay_in_evaluation_mode_also_in_a_copy() -> None:
    model: Any = made("cnn", [1, 8, 8], freeze=["body.0"])
    for candidate in (model, copy.deepcopy(model)):
        candidate.train()
        assert not candidate.body[0][1].training and candidate.body[2][1].training
        assert candidate.body[0][0].training  # only layers with statistics
        mean = candidate.body[0][1].running_mean.clone()
        candidate(torch.randn(4, 1, 8, 8))
        assert torch.equal(candidate.body[0][1].running_mean, mean)
    plain: Any = made("cnn", [1, 8, 8])
    mean = plain.body[0][1].running_mean.clone()
    plain.train()(torch.randn(4, 1, 8, 8))
    assert not torch.equal(plain.body[0][1].running_mean, mean)


def test_frozen_norms_stay_frozen_where_the_others_are_synchronised() -> None:
    model: Any = made("cnn", [1, 8, 8], freeze=["body.0"])
    model = synchronise_batch_norm(model, torch.device("cuda"))  # which converts on any machine
    for candidate in (model, copy.deepcopy(model)):
        frozen, other = candidate.body[0][1], candidate.body[2][1]
        assert isinstance(other, nn.SyncBatchNorm)
        for mode in (True, False, True):
            candidate.train(mode)
            assert (frozen.training, other.training) == (False, mode)


def test_freeze_returns_the_names_of_what_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert freeze(model, ["0"]) == ["0.weight", "0.bias"]
    assert freeze(nn.Linear(2, 2), []) == []


@pytest.mark.parametrize(
    ("name", "shape", "changed", "message"),
    [
        ("cnn", [1, 8, 8], {"freeze": ["bodi"]}, "model.freeze=bodi .* Did you mean body?"),
        ("cnn", [1, 8, 8], {"freeze": ["zzz*"]}, "top modules are body, dropout, head"),
        ("mlp", [4], {"freeze": ["*"]}, "nothing to train"),
        ("mlp", [4], {"init": "xaver"}, "model.init=xaver is unknown. Did you mean xavier?"),
        ("mlp", [4], {"activation": "rely"}, "model.activation=rely .* relu?"),
        ("mlp", [4], {"norm": "instance"}, "model.norm=instance"),
        ("mlp", [4], {"hidden": [], "norm": "bach"}, "model.norm=bach .* batch?"),
        ("mlp", [4], {"hidden": [], "activation": "rely"}, "model.activation=rely .* relu?"),
        ("mlp", [4], {"hidden": [8, 0]}, "model.hidden="),
        ("mlp", [4, 0], {}, r"model.input_shape=\[4, 0\]"),
        ("mlp", [], {}, r"model.input_shape=\[\]"),
        ("cnn", [4], {}, "Use model=mlp"),
        ("cnn", [1, 4, 8], {}, "smaller than 8x8"),
        ("cnn", [1, 8, 8], {"channels": []}, "model.channels="),
        ("whitened_cnn", [1, 8, 8], {}, "smaller than 9x9"),
        ("whitened_cnn", [3, 32, 32], {"channels": [8, 8]}, "there are three stages. Give three"),
        ("whitened_cnn", [3, 32, 32], {"views": "ten"}, "one, mirror, mirror_shift"),
        ("resnet18", [30], {}, "Use model=mlp"),
        ("resnet18", [3, 32, 32], {"depth": 34}, "model.depth=34"),
        ("resnet18", [3, 32, 32], {"pretrained": True, "init": "he"}, "model.init=he"),
        ("unet", [1, 8, 8], {"channels": [4] * 5}, "than 16x16, .* Give fewer model.channels"),
        ("vit", [3, 32, 40], {}, "not square"),
        ("vit", [3, 32, 32], {"patch_size": 5}, "model.patch_size=5"),
        ("vit", [3, 31, 31], {}, "no patch divides"),
        ("vit", [3, 32, 32], {"heads": 5}, "model.heads=5"),
        ("vit", [3, 32, 32], {"pretrained": True}, "model.patch_size=16 model.width=768"),
    ],
)
def test_an_impossible_setting_of_a_model_is_an_error_of_one_line(
    name: str, shape: list[int], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        made(name, shape, **changed)
    assert "\n" not in str(error.value)


def test_pretrained_without_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"model.pretrained=true: could not get https.*checkpoints"):
        made("resnet18", [3, 96, 96], pretrained=True)


def test_pretrained_weights_are_loaded_where_they_fit_and_the_rest_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torchvision.models import ResNet18_Weights, resnet18

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints" / Path(ResNet18_Weights.DEFAULT.url).name
    file.parent.mkdir(parents=True)
    torch.manual_seed(7)
    found = resnet18().state_dict()
    torch.save(found, file)
    with caplog.at_level("INFO", logger="lab.models.vision"):
        model = made("resnet18", [3, 32, 32], pretrained=True)
    own = model.state_dict()
    assert torch.equal(own["layer4.1.conv2.weight"], found["layer4.1.conv2.weight"])
    assert "119 of 122 tensors loaded; new: conv1.weight, fc.weight, fc.bias" in caplog.text
    fitting = made("resnet18", [3, 96, 96], 1000, pretrained=True).state_dict()
    assert all(torch.equal(fitting[key], found[key]) for key in found)


@pytest.mark.slow
def test_the_cnn_learns_digits() -> None:
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    images = torch.tensor(inputs, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
    labels = torch.tensor(targets)
    model = made("cnn", [1, 8, 8], 10, channels=[16, 32, 64])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = torch.randperm(len(images))
    train, test = order[:1400], order[1400:]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    for _ in range(12):
        for part in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
        schedule.step()
    accuracy = (model.eval()(images[test]).argmax(1) == labels[test]).double().mean()
    assert accuracy > 0.98
