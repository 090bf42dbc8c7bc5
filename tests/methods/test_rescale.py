"""Rescaling the inputs of single layers; whole families are in the conformance tests of absorbers.

Legend: as in `rescale`.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlaw.methods.method import Rescaling
from bitlaw.methods.rescale import can_fold, rescale, weight_absmax
from bitlaw.models.generator import Absorber, Site
from bitlaw.models.networks.var import QKVLinear
from bitlaw.prepared import LowRankBranch, PreparedConv2d, PreparedLinear


class Gated(nn.Module):
    """A norm, two linears that share its output, a product, and a linear behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(6, 8)
        self.down = nn.Linear(8, 4, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.down(F.silu(self.gate(h)) * self.up(h))

    def sites(self) -> list[Site]:
        norm, up = Absorber.norm("norm"), Absorber.rows("up", 0, 8, shifts=False)
        return [
            Site("gate", "fc1", 0, "blocks", 1, norm),
            Site("up", "fc1", 0, "blocks", 1, norm),
            Site("down", "fc2", 0, "blocks", 1, up),
        ]


@pytest.fixture
def net() -> Gated:
    torch.manual_seed(0)
    return Gated()


def scales(count: int, seed: int = 0) -> Tensor:
    return torch.exp2(4 * torch.rand(count, generator=torch.Generator().manual_seed(seed)) - 2)


def exact(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_is_folded_leaves_no_trace_but_the_numbers(net: Gated) -> None:
    x, shift = torch.randn(5, 6).double(), torch.randn(6)
    before, old = net(x), {name: tensor.clone() for name, tensor in net.state_dict(keep_vars=True).items()}
    kept = dict(net.named_parameters())
    shared = Rescaling(scales(6), shift)
    assert rescale(net, net.sites(), {"gate": shared, "up": shared, "down": Rescaling(scales(8))}) == {
        "gate",
        "up",
        "down",
    }
    exact(net(x), before)
    assert type(net.gate) is nn.Linear and list(net.state_dict()) == list(old)
    for name, parameter in kept.items():  # those of before may be mapped from a file, and are not written to
        assert torch.equal(parameter, old[name])


def test_a_scale_is_explicit_if_another_user_of_the_absorber_is_left_out(net: Gated) -> None:
    x = torch.randn(5, 6).double()
    before = net(x)
    assert rescale(net, net.sites(), {"gate": Rescaling(scales(6))}) == set()
    assert isinstance(net.gate, PreparedLinear) and not isinstance(net.up, PreparedLinear)
    exact(net(x), before)
    assert not can_fold(net, net.sites(), "up")  # its absorber now has a user with a scale between them


def test_scales_that_follow_one_another_become_one(net: Gated) -> None:
    x = torch.randn(5, 6).double()
    before = net(x)
    first, second, third = (Rescaling(scales(6, seed), torch.randn(6)) for seed in range(3))
    for rescaling in (first, second, Rescaling(third.scale_C)):
        rescale(net, net.sites(), {"up": rescaling})
        exact(net(x), before)
    assert isinstance(net.up, PreparedLinear) and net.up.scaling is not None
    together = first.scale_C * second.scale_C * third.scale_C
    torch.testing.assert_close(net.up.scaling.scale_C, together, rtol=2e-3, atol=0)  # three roundings to float16


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_any_groups(groups: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=groups)).double().requires_grad_(False)
    x = torch.randn(2, 4, 5, 5).double()
    before, conv = net(x), net[0]
    per_group = conv.weight.unflatten(0, (groups, -1))  # group, output, channel, row, column
    places = [divmod(channel, 4 // groups) for channel in range(4)]
    expected = [float(per_group[group, :, channel].abs().max()) for group, channel in places]
    torch.testing.assert_close(weight_absmax(conv), torch.tensor(expected))
    rescale(net, [Site("0", "conv", 0, "blocks", 1)], {"0": Rescaling(scales(4))})
    assert isinstance(net[0], PreparedConv2d)
    exact(net(x), before)


def test_mistakes_are_named_all_at_once_and_change_nothing(net: Gated) -> None:
    old = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    wrong = {
        "gate": Rescaling(scales(6)),
        "up": Rescaling(scales(6, seed=1)),
        "down": Rescaling(scales(8), torch.zeros(8)),
        "nowhere": Rescaling(scales(6)),
    }
    with pytest.raises(ValueError) as error:
        rescale(net, net.sites(), wrong)
    text = str(error.value)
    assert "gate, up: share" in text and "down: no bias" in text and "nowhere: " in text
    for scale_C, message in (
        (torch.tensor([1.0, 0, 1, 1, 1, 1]), "positive"),
        (torch.full((6,), torch.nan), "positive"),
        (torch.ones(5), "6 input channels"),
    ):
        with pytest.raises(ValueError, match=f"gate: .*{message}"):
            rescale(net, net.sites(), {"gate": Rescaling(scale_C)})
    assert all(torch.equal(tensor, old[name]) for name, tensor in net.state_dict().items())


def test_shifts_that_nothing_can_undo_are_refused() -> None:
    one = Rescaling(torch.ones(4), torch.ones(4))
    for layer, message in ((nn.Conv2d(4, 4, 3), "padding"), (QKVLinear(4), "no bias for its keys")):
        with pytest.raises(ValueError, match=f"0: .*{message}"):
            rescale(nn.Sequential(layer), [Site("0", "qkv", 0, "blocks", 1)], {"0": one})


def test_a_layer_with_a_branch_is_not_rescaled(net: Gated) -> None:
    net.down = PreparedLinear.of(net.down, branch=LowRankBranch(torch.ones(1, 8), torch.ones(4, 1)))
    with pytest.raises(ValueError, match="down: has a low-rank branch"):
        rescale(net, net.sites(), {"down": Rescaling(scales(8))})


def test_numbers_that_do_not_fit_are_an_error() -> None:
    net = nn.Sequential(nn.Linear(4, 4)).half().requires_grad_(False)
    net[0].weight = nn.Parameter(torch.full((4, 4), 100.0, dtype=torch.float16), requires_grad=False)
    with pytest.raises(ValueError, match=r"0\.weight: rescaled, it does not fit torch\.float16"):
        rescale(net, [Site("0", "fc1", 0, "blocks", 1)], {"0": Rescaling(torch.full((4,), 1000.0))})
