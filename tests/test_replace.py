"""Blocks into a model: which convolutions, with which norms, what is kept, and the way back."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from dbb import (
    ACBlock,
    DiverseBranchBlock,
    RepVGGBlock,
    assert_equivalent,
    check_optimizer,
    fold,
    randomize_norms_,
    reparameterize,
    replace_convs,
    survey_convs,
)
from dbb.blocks import BLOCKS
from dbb.surgery import Absorbed
from tests.support import image

pytestmark = pytest.mark.slow  # surgery on whole networks


class Pair(nn.Module):
    """A convolution, its batch norm, and more around them."""

    def __init__(self, conv: nn.Module | None = None, norm: nn.Module | None = None):
        super().__init__()
        self.norm = norm or nn.BatchNorm2d(4)  # registered first: the order of the layers says nothing
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Twice(Pair):
    """One pair, used two times."""

    def forward(self, x):
        return super().forward(super().forward(x))


class Passed(Pair):
    """Something in between that passes the answer on."""

    def __init__(self):
        super().__init__()
        self.between = nn.Sequential(nn.Identity(), nn.Identity())

    def forward(self, x):
        return self.norm(self.between(self.conv(x)))


class Fork(Pair):
    """The convolution's answer is used beside the norm, too."""

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class TwoNorms(Pair):
    """Another norm for each use, as a detector's head has."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.other(self.conv(2 * x))


class NormOfTwo(Pair):
    """One norm for two convolutions."""

    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(self.second(x))


class WeightRead(Pair):
    """The weight is used without the layer."""

    def forward(self, x):
        return super().forward(x) + F.conv2d(x, self.conv.weight, padding=1)


class Tied(Pair):
    """The weight belongs to two layers."""

    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.second.weight = self.conv.weight

    def forward(self, x):
        return self.second(super().forward(x))


class Unused(Pair):
    """A layer that forward does not call."""

    def forward(self, x):
        return x


class LooksAtValues(Pair):
    """Cannot be traced, since what it does depends on the numbers."""

    def forward(self, x):
        return super().forward(x) if x.mean() > -100 else x


class Around(nn.Module):
    """What cannot be traced stands deep inside, and in a list."""

    def __init__(self):
        super().__init__()
        self.stem = Pair()
        self.deep = nn.ModuleList([LooksAtValues(), nn.Sequential(Pair(), LooksAtValues())])
        self.head = Pair()

    def forward(self, x, scale=None, flip=False):
        x = self.stem(x)
        for layer in self.deep:
            x = layer(x)
        return self.head(x if scale is None else x * scale)


class OnlyInTraining(Pair):
    """A second head that eval mode does not call."""

    def __init__(self):
        super().__init__()
        self.second = Pair()

    def forward(self, x):
        return super().forward(x) + (self.second(x) if self.training else 0)


class OtherForward(nn.Conv2d):
    """A convolution whose forward is its own."""

    def forward(self, x):
        return super().forward(x) * 2


def ready(model: nn.Module) -> nn.Module:
    return randomize_norms_(model).double().eval()


# Which


@pytest.mark.parametrize("kind", [Pair, Twice, Passed, OnlyInTraining])
@pytest.mark.parametrize("training", [True, False])
def test_a_pair_is_found_in_the_graph(kind, training):
    survey = survey_convs(kind().train(training))
    assert {c.name: c.norm for c in survey.replaced}["conv"] == "norm"
    assert len(survey.replaced) == len(survey)


LEFT_ALONE = {
    "more than one batch norm reads it: BatchNorm2d, add": Fork,
    "more than one batch norm reads it: BatchNorm2d, BatchNorm2d": TwoNorms,
    "its batch norm reads other layers, too": NormOfTwo,
    "its weight is read outside of it": WeightRead,
    "it shares a parameter with another layer": Tied,
    "forward does not call it": Unused,
    "LooksAtValues cannot be traced (TraceError: ": LooksAtValues,
    "no batch norm reads it, but ReLU": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
    "no batch norm reads it, but the output": lambda: nn.Sequential(nn.Conv2d(4, 4, 3)),
    "no batch norm reads it, but GroupNorm": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)),
    "OtherForward is a kind of nn.Conv2d": lambda: Pair(OtherForward(4, 4, 3)),
    "ParametrizedConv2d is a kind of": lambda: Pair(parametrizations.weight_norm(nn.Conv2d(4, 4, 3))),
    "its weight is computed from others": lambda: Pair(nn.utils.spectral_norm(nn.Conv2d(4, 4, 3))),
    "keeps no running statistics": lambda: Pair(norm=nn.BatchNorm2d(4, track_running_stats=False)),
    "of 4 channels in torch.float32, unlike": lambda: Pair(nn.Conv2d(4, 4, 3, dtype=torch.float64)),
    "kernel 7x7, outside of 1 < K < 7": lambda: Pair(nn.Conv2d(4, 4, 7)),
    "kernel 1x1, outside of 1 < K < 7": lambda: Pair(nn.Conv2d(4, 4, 1)),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*")
@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_left_alone_and_said_why(reason):
    model = LEFT_ALONE[reason]()
    state = copy.deepcopy(model.state_dict())
    assert all(reason in choice.reason for choice in survey_convs(model)), survey_convs(model)
    with pytest.raises(ValueError, match="nothing to replace: 0 of"):
        replace_convs(model, inplace=True)
    assert state.keys() == model.state_dict().keys()


def test_what_the_block_refuses_is_a_reason():
    wide = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6))
    (choice,) = survey_convs(wide, RepVGGBlock, branches=["kxk", "identity"])
    assert "identity branch" in choice.reason
    (choice,) = survey_convs(wide, internal_channels=3)
    assert choice.replaced


def test_around_what_cannot_be_traced():
    survey = {choice.name: choice for choice in survey_convs(Around())}
    assert [name for name, choice in survey.items() if choice.replaced] == ["stem.conv", "deep.1.0.conv", "head.conv"]
    for name in ("deep.0.conv", "deep.1.1.conv"):
        assert "LooksAtValues cannot be traced" in survey[name].reason and "by hand" in survey[name].reason


def test_pairs_by_hand():
    model = ready(LooksAtValues())
    replaced = replace_convs(model, pairs={"conv": "norm"}, preserve=True, say=None)
    assert type(replaced.conv) is DiverseBranchBlock and type(replaced.norm) is Absorbed
    assert_equivalent(model, replaced, image(4))
    alone = ready(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))
    replaced = replace_convs(alone, pairs={"0": None}, preserve=True, say=None)
    assert_equivalent(alone, replaced, image(4))


@pytest.mark.parametrize(
    "where, chosen",
    [
        (None, ["0.conv", "1.conv"]),
        ("1.*", ["1.conv"]),
        ("2.conv", ["2.conv"]),
        ("re:[02]", ["0.conv", "2.conv"]),
        (lambda name, conv: conv.kernel_size == (1, 1), ["2.conv"]),
    ],
)
def test_where(where, chosen):
    model = nn.Sequential(Pair(), Pair(), Pair(nn.Conv2d(4, 4, 1)))
    assert [choice.name for choice in survey_convs(model, where=where).replaced] == chosen


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"where": "re:("}, "no regular expression: missing"),
        ({"where": 3}, "where=3 is no rule: give where"),
        ({"where": "nowhere.*"}, r"not chosen by where='nowhere\.\*': conv"),
        ({"where": lambda name, conv: False}, "not chosen by where: conv"),
        ({"block": "dbb2"}, "block='dbb2' is not known: choose from plain"),
        ({"block": nn.Conv2d}, "give a subclass of dbb.ConvBlock"),
        ({"pairs": {"cnv": "norm"}}, "pairs names 'cnv', which is no nn.Conv2d of the model: it has conv"),
        ({"pairs": {"conv": "bn"}}, "pairs names 'bn', which is no batch norm of the model: it has norm"),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        replace_convs(Pair(), **arguments)


def test_a_norm_goes_into_one_block():
    with pytest.raises(ValueError, match="pairs gives norm to two convolutions"):
        replace_convs(NormOfTwo(), pairs={"conv": "norm", "second": "norm"})


def test_models_that_cannot_be_operated_on():
    with pytest.raises(ValueError, match=r"wrapped in DataParallel.*put the blocks into model\.module"):
        replace_convs(nn.DataParallel(Pair()))
    with pytest.raises(ValueError, match="lazy layers without weights: send one batch"):
        replace_convs(Pair(nn.LazyConv2d(4, 3)))
    with pytest.raises(ValueError, match=r"no nn\.Conv2d in the model"):
        replace_convs(nn.Linear(3, 3))


def test_it_is_said_what_is_done():
    heard = []
    model = nn.Sequential(Pair(), *(Pair(nn.Conv2d(4, 4, 1)) for _ in range(4)))
    replace_convs(model, say=heard.append)
    assert heard == [
        "1 of 5 convolutions replaced\n"
        "  4 left alone, kernel 1x1, outside of 1 < K < 7: 1.conv, 2.conv, 3.conv, ..."
    ]  # fmt: skip
    lines = str(survey_convs(model)).splitlines()
    assert lines[0] == "0.conv (4 -> 4, 3x3, stride 1x1, groups 1) with 0.norm"
    assert lines[1].endswith("left alone: kernel 1x1, outside of 1 < K < 7")


# What is kept


@pytest.mark.parametrize("block", [name for name in BLOCKS if name != "linear"])  # which has no place for the weights
@pytest.mark.parametrize(
    "conv",
    [
        {},
        {"bias": True},
        {"stride": 2},
        {"groups": 4},
        {"groups": 2, "padding": 0},
        {"dilation": 2, "padding": 2},
        {"padding_mode": "reflect"},
        {"kernel_size": 5, "padding": 1},
        {"kernel_size": (1, 3), "padding": (0, 1)},
    ],
    ids=str,
)
def test_preserve_starts_as_the_trained_model(block, conv):
    torch.manual_seed(0)
    model = ready(Pair(nn.Conv2d(4, 4, **{"kernel_size": 3, "padding": 1, "bias": False} | conv)))
    model.norm.eps, model.norm.momentum = 1e-3, 0.01
    replaced = replace_convs(model, block, preserve=True, say=None)
    assert_equivalent(model, replaced, image(4))
    norms = [m for m in replaced.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
    silent = [b for name, b in replaced.conv.branches.named_children() if name != "kxk"]
    assert not any(fold(branch).weight.any() for branch in silent)
    if silent:  # without it, the other branches are heard at once
        with pytest.raises(AssertionError):
            assert_equivalent(model, replace_convs(model, block, say=None), image(4))


def test_preserve_needs_a_place_for_the_weights_and_silence_for_the_rest():
    model = Pair()
    state = copy.deepcopy(model.state_dict())
    for options, message in (
        ({"branches": ["1x1"]}, r'keeps the trained weights in the branch "kxk", which .* does not have here \(1x1\)'),
        ({"deploy": True}, "it is folded"),
        ({"branches": {"kxk": "kxk", "loud": loud}}, "does not silence 'loud'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace_convs(model, preserve=True, inplace=True, **options)
        assert model.state_dict().keys() == state.keys()  # nothing was half done


def loud(spec):
    """A branch that ends in a norm with a shift."""
    branch = RepVGGBlock.recipes(spec)["1x1"](spec)
    nn.init.ones_(branch.bn.bias)
    return branch


@pytest.mark.parametrize("inplace", [True, False])
def test_a_copy_or_the_model_itself(inplace):
    model = Twice()
    before = copy.deepcopy(model)
    replaced = replace_convs(model, inplace=inplace, say=None)
    assert (replaced is model) is inplace
    if not inplace:
        assert_equivalent(before.eval(), model.eval(), image(4).float())


@pytest.mark.parametrize("inplace", [True, False])
def test_a_bare_convolution(inplace):
    conv = nn.Conv2d(4, 6, 3, stride=2).double().eval()
    block = replace_convs(conv, preserve=True, inplace=inplace, say=None)
    assert type(block) is DiverseBranchBlock
    assert_equivalent(conv, block, image(4))
    assert_equivalent(block, reparameterize(block, restore=True, say=None), image(4))


def test_shared_layers_stay_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = Pair()
            self.two = self.one
            self.alias = self.one.conv

        def forward(self, x):
            return self.two(self.one(x))

    replaced = replace_convs(Shared(), say=None)
    assert replaced.one is replaced.two and replaced.alias is replaced.one.conv
    assert type(replaced.alias) is DiverseBranchBlock
    restored = reparameterize(replaced.eval(), restore=True, say=None)
    assert type(restored.alias) is nn.Conv2d and restored.alias is restored.two.conv


def test_mode_dtype_layout_and_frozen_layers_are_kept():
    model = nn.Sequential(Pair(), Pair(), Pair()).to(torch.bfloat16, memory_format=torch.channels_last)
    model[0].eval()
    model[1].norm.eval()  # as finetuning with frozen norms has it
    model[1].requires_grad_(False)
    replaced = replace_convs(model, say=None)
    first, second, third = (pair.conv for pair in replaced)
    assert [m.training for m in (first, second, third, replaced[0].norm, replaced[2].norm)] == [0, 0, 1, 0, 1]
    assert [all(p.requires_grad for p in block.parameters()) for block in (first, second, third)] == [True, False, True]
    assert not any(p.requires_grad for p in second.parameters())
    assert all(t.dtype == torch.bfloat16 for t in replaced.state_dict().values() if t.is_floating_point())
    assert third.branches["kxk"].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert {t.device.type for t in replace_convs(model.to("meta"), say=None).state_dict().values()} == {"meta"}


def test_hooks_are_kept_and_still_removed_by_their_handle():
    model, heard = Pair(), []
    handles = [
        layer.register_forward_hook(lambda module, given, answer: heard.append(type(module).__name__))
        for layer in (model.conv, model.norm)
    ]
    replaced = replace_convs(model, inplace=True, say=None)
    assert not heard  # tracing does not call them
    replaced(image(4).float())
    assert heard == ["DiverseBranchBlock", "Absorbed"]
    folded = reparameterize(replaced.eval())
    folded(image(4).float())
    reparameterize(replaced, restore=True, say=None)(image(4).float())
    assert heard[2:] == ["Conv2d", "Identity", "Conv2d", "BatchNorm2d"]
    del heard[:]
    handles[0].remove()
    replaced(image(4).float())
    assert heard == ["Absorbed"]


def test_hooks_of_a_folded_copy_are_its_own():
    heard = []
    model = replace_convs(Pair(), say=None).eval()
    folded = reparameterize(model)
    model.conv.register_forward_hook(lambda module, given, answer: heard.append(type(module).__name__))
    folded(image(4).float())
    assert heard == []


def test_sync_batch_norms_stay_so():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Pair())
    replaced = replace_convs(model, say=None)
    norms = [m for m in replaced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    restored = reparameterize(replaced.eval(), restore=True, say=None)
    assert type(restored.norm) is nn.SyncBatchNorm


def test_names_do_not_move():
    replaced = replace_convs(nn.Sequential(Pair(), nn.Conv2d(4, 2, 1)), say=None)
    assert {name.split(".branches.")[0] for name in replaced.state_dict()} == {"0.conv", "1.weight", "1.bias"}
    assert [name for name, _ in replaced.named_children()] == ["0", "1"]


def test_the_same_seed_builds_the_same_blocks():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(replace_convs(nn.Sequential(Pair(), Pair()), say=None).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states)))


# The way back


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-1])
def test_restore_loads_strictly_and_answers_the_same(bias, affine, eps):
    original = ready(Pair(nn.Conv2d(4, 4, 3, bias=bias), nn.BatchNorm2d(4, eps=eps, affine=affine)))
    model = ready(replace_convs(original, say=None))
    restored = reparameterize(model, restore=True, say=None)
    assert type(restored.conv) is nn.Conv2d and type(restored.norm) is nn.BatchNorm2d
    original.load_state_dict(restored.state_dict())
    assert_equivalent(model, original, image(4))
    assert restored.norm.num_batches_tracked == 0


def test_restore_says_what_its_norms_are_for():
    heard = []
    reparameterize(replace_convs(Pair(), say=None).eval(), restore=True, say=heard.append)
    reparameterize(replace_convs(nn.Conv2d(4, 4, 3), say=None).eval(), restore=True, say=heard.append)
    assert "1 blocks folded, 1 batch norms back" in heard[0] and "norms frozen" in heard[0]
    assert "1 blocks folded, 0 batch norms back" in heard[1]


def test_restore_after_copies_pickles_and_folding():
    model = ready(replace_convs(Pair(), say=None))
    file = io.BytesIO()
    torch.save(copy.deepcopy(model), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    again.conv.switch_to_deploy()
    restored = reparameterize(again, inplace=True, restore=True, say=None)
    assert restored is again and type(restored.norm) is nn.BatchNorm2d
    assert_equivalent(model, restored, image(4))


def test_restore_only_what_was_put_in():
    for model in (nn.Sequential(DiverseBranchBlock(4, 4, 3)), nn.Sequential(nn.Conv2d(4, 4, 3))):
        with pytest.raises(ValueError, match="restore=True gives back what replace_convs took out, and none of the"):
            reparameterize(model.eval(), restore=True)


def test_restore_refuses_what_its_place_has_no_room_for():
    ends = replace_convs(Pair(), nonlinear=nn.ReLU(), say=None).eval()
    with pytest.raises(ValueError, match="conv ends in ReLU, for which the restored pair has no room"):
        reparameterize(ends, restore=True)
    bare = replace_convs(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False)), pairs={"0": None}, say=None)
    with pytest.raises(ValueError, match="0 was a convolution without bias and norm, which cannot hold a bias"):
        reparameterize(ready(bare), restore=True)


def test_what_else_a_norm_does_is_kept():
    norm_act = pytest.importorskip("timm.layers", reason="timm is not installed").BatchNormAct2d
    original = ready(Pair(norm=norm_act(4, act_layer=nn.PReLU, drop_layer=lambda: nn.Dropout(0.5))))
    model = replace_convs(original, preserve=True, say=None)
    assert "norm.act.weight" in model.state_dict()
    assert_equivalent(original, model, image(4))
    model = ready(replace_convs(original, say=None))
    folded = reparameterize(model)
    assert [type(m) for m in folded.norm] == [nn.Dropout, nn.PReLU]
    assert_equivalent(model, folded, image(4))
    restored = reparameterize(model, restore=True, say=None)
    original.load_state_dict(restored.state_dict())
    assert_equivalent(model, original, image(4))


def test_nothing_of_ours_is_left():
    folded = reparameterize(replace_convs(Pair(), ACBlock, say=None).eval())
    assert {type(m) for m in folded.modules()} == {Pair, nn.Conv2d, nn.Identity}


# Optimizers


def test_an_optimizer_built_too_early_is_noticed():
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    check_optimizer(optimizer, model)
    with pytest.warns(UserWarning, match="SGD was built before the layers were exchanged"):
        replaced = replace_convs(model, inplace=True, say=None)
    with pytest.raises(ValueError, match=r"trains 3 parameters that the model does not hold, and leaves out 1\d that"):
        check_optimizer(optimizer, replaced)
    optimizer = torch.optim.SGD(replaced.parameters(), lr=0.1)
    check_optimizer(optimizer, replaced)
    with pytest.warns(UserWarning, match="build it anew"):
        reparameterize(replaced.eval(), inplace=True)
    with pytest.raises(ValueError, match="build it anew"):
        check_optimizer(optimizer, replaced)


def test_no_false_alarm():
    model = Pair()
    torch.optim.SGD(model.parameters(), lr=0.1)  # nobody holds it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = torch.optim.SGD(Pair().parameters(), lr=0.1)
        replaced = replace_convs(model, say=None).eval()
        mine = torch.optim.SGD(replaced.parameters(), lr=0.1)
        reparameterize(replaced)  # a copy, as for an evaluation between epochs
        check_optimizer(mine, replaced)
    assert other.param_groups


def test_frozen_parameters_need_no_optimizer():
    model = Pair()
    model.norm.requires_grad_(False)
    check_optimizer(torch.optim.SGD([model.conv.weight], lr=0.1), model)
