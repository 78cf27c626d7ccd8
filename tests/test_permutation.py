"""Orders of channels in which N:M keeps more, and networks that compute the same in them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from purprune import NM, ConfigError, NaNError, Rule, SelectionError, compute_masks
from purprune.permutation import kept_magnitude, search_permutation
from purprune.permuting import inverse, permute_inputs
from strategies import DTYPES, any_values, exact_values, views, weights


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


small = st.lists(st.integers(1, 9), min_size=2, max_size=4).filter(lambda s: math.prod(s) <= 400)
finite = any_values.filter(math.isfinite)
ratios = st.integers(1, 5).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m)))


@given(weights(small, finite, DTYPES), ratios, st.data())
def test_no_order_that_is_found_keeps_less(w: Tensor, ratio: tuple[int, int], data: st.DataObject):
    """Defends the promise for every dtype, tie, tail, dim and number of channels."""
    w = w.nan_to_num(0, 1, 1)
    zeros, m = ratio
    dim = data.draw(st.integers(-w.dim(), w.dim() - 1))
    before = w.clone()
    order = search_permutation(w, zeros, m, dim=dim)
    assert order.sort().values.tolist() == list(range(w.shape[dim]))
    assert torch.equal(w, before)
    now = kept_magnitude(w, zeros, m, dim=dim)
    assert kept_magnitude(w.index_select(dim, order), zeros, m, dim=dim) >= now
    assert torch.equal(search_permutation(data.draw(views(w)), zeros, m, dim=dim), order)
    tail = w.shape[dim] % m
    assert order[w.shape[dim] - tail :].tolist() == [*range(w.shape[dim] - tail, w.shape[dim])]


def best_of_all(w: Tensor, zeros: int, m: int) -> float:
    """Return what the best order of two groups keeps: which channels are beside channel 0?"""
    channels = range(2 * m)
    sums = []
    for others in itertools.combinations(channels[1:], m - 1):
        first = [0, *others]
        order = [*first, *(i for i in channels if i not in first)]
        sums.append(kept_magnitude(w[:, order], zeros, m))
    return max(sums)


@given(
    weights(st.tuples(st.integers(1, 5), st.just(4)).map(list), exact_values.filter(math.isfinite))
)
def test_two_groups_of_two_get_their_best_order(w: Tensor):
    """Defends the gains of exchanges: one exchange leads to any of the three ways to pair."""
    order = search_permutation(w, 1, 2)
    assert kept_magnitude(w[:, order], 1, 2) == best_of_all(w, 1, 2)


def test_of_two_groups_of_four_nearly_all_get_their_best_order():
    """Defends the search where it may end in an order that no single exchange improves."""
    gained = possible = 0.0
    for seed in range(40):
        w = random(3, 8, seed=seed)
        now = kept_magnitude(w, 2, 4)
        gained += kept_magnitude(w[:, search_permutation(w, 2, 4)], 2, 4) - now
        possible += best_of_all(w, 2, 4) - now
    assert 0.97 * possible < gained <= possible * (1 + 1e-9)


@pytest.mark.parametrize(("zeros", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 4)])
def test_no_exchange_of_two_channels_improves_the_order(zeros: int, m: int):
    """Defends the greedy search to its end, against exchanges tried one by one."""
    w = random(6, 3 * m)
    found = w[:, search_permutation(w, zeros, m)]
    kept = kept_magnitude(found, zeros, m)
    assert kept > kept_magnitude(w, zeros, m)
    for a, b in itertools.combinations(range(3 * m), 2):
        order = list(range(3 * m))
        order[a], order[b] = b, a
        assert kept_magnitude(found[:, order], zeros, m) <= kept * (1 + 1e-8)


def test_random_weights_keep_more_and_threads_change_nothing():
    """Defends the use of it: of what 2:4 loses against unstructured pruning, a part comes back."""
    w = random(64, 64)
    order = search_permutation(w, 2, 4)
    now, then = kept_magnitude(w, 2, 4), kept_magnitude(w[:, order], 2, 4)
    most = float(w.abs().flatten().topk(w.numel() // 2).values.sum())
    assert then - now > 0.3 * (most - now)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(search_permutation(w, 2, 4), order)
    finally:
        torch.set_num_threads(threads)


def test_rows_are_all_others_and_a_sample_of_them_does_no_harm():
    """Defends convolutions, whose groups lie at each position, and large layers."""
    w = random(8, 12, 3, 3)
    order = search_permutation(w, 2, 4)
    flat = w.movedim(1, 3).reshape(-1, 12)
    assert torch.equal(order, search_permutation(flat, 2, 4))
    assert kept_magnitude(w[:, order], 2, 4) > kept_magnitude(w, 2, 4)
    rare = torch.cat([torch.eye(4).repeat(4, 1)[:, [0, 2, 1, 3]] * 1e-3, random(3, 4)]) * 100
    for sample in range(1, 20):
        found = rare[:, search_permutation(rare, 1, 2, sample=sample)]
        assert kept_magnitude(found, 1, 2) >= kept_magnitude(rare, 1, 2)


def test_other_scores_are_kept_instead():
    """Defends score=: the order is that of the score, and the weight's own is another."""
    w, score = random(8, 16), random(8, 16, seed=1)
    order = search_permutation(w, 2, 4, score=score)
    assert torch.equal(order, search_permutation(score, 2, 4))
    assert not torch.equal(order, search_permutation(w, 2, 4))


def test_what_cannot_be_searched_is_refused():
    """Defends NaN, infinities, shapes and impossible ratios, each with its way out."""
    w = random(4, 8)
    with pytest.raises(NaNError, match="the score; got 1 NaN of 32"):
        search_permutation(torch.where(w == w.max(), math.nan, w), 2, 4)
    with pytest.raises(ValueError, match="finite scores"):
        search_permutation(torch.where(w == w.max(), math.inf, w), 2, 4)
    with pytest.raises(ValueError, match=r"scores of shape \(4, 8\); got \(8, 4\)"):
        search_permutation(w, 2, 4, score=w.T)
    with pytest.raises(ConfigError, match="zeros <= m"):
        search_permutation(w, 5, 4)
    with pytest.raises(ConfigError, match="got dim=2"):
        search_permutation(w, 2, 4, dim=2)
    for bad in (torch.tensor([0, 0]), torch.tensor([0.0, 1.0]), torch.eye(2).long()):
        with pytest.raises(ValueError, match="Expected a permutation"):
            inverse(bad)


@given(st.permutations(range(7)))
def test_the_inverse_undoes_a_permutation(order: list[int]):
    """Defends inverse: both ways round."""
    p = torch.tensor(order)
    assert p[inverse(p)].tolist() == inverse(p)[p].tolist() == list(range(7))


class _Attention(nn.Module):
    """A residual stream that a projection and an embedding write to, with three consumers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 12), nn.LayerNorm(12)
        self.q, self.k, self.v = (nn.Linear(12, 6) for _ in range(3))
        self.out, self.head = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n = self.norm(x)
        mixed = torch.softmax(self.q(n) @ self.k(n).mT, dim=-1) @ self.v(n)
        return self.head(x + self.out(mixed))


NETWORKS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4)),
        (6, 5),
        (["3"], ["0", "1"]),
    ),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.GroupNorm(8, 8),
            nn.Conv2d(8, 3, 1),
        ),
        (2, 2, 7, 7),
        (["5"], ["0", "1", "2", "3", "4"]),
    ),
    "conv, then flat": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)),
        (2, 2, 5, 5),
        (["3.weight"], ["0.weight", "0.bias"]),
    ),
    "residual stream": (
        _Attention,
        (2, 7, 5),
        (["q", "k", "v", "head"], ["embed", "out", "norm"]),
    ),
}


@pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS)
def test_the_network_computes_what_it_did(case):
    """Defends the permutation of all that channels pass, buffers among it, within rounding."""
    make, size, (consumers, producers) = case
    torch.manual_seed(0)
    model = make().double().eval()
    params = {
        name: tensor + 0.1 * random(*tensor.shape).double().abs() if tensor.dim() else tensor
        for name, tensor in model.state_dict().items()
    }
    first = next(name for name in params if name.startswith(producers[0]))
    order = torch.arange(len(params[first])).flip(0).roll(3)
    before = {name: tensor.clone() for name, tensor in params.items()}
    permuted = permute_inputs(params, consumers, order, producers=producers)
    x = random(*size).double()
    expected = functional_call(model, params, (x,))
    assert torch.allclose(functional_call(model, permuted, (x,)), expected, rtol=0, atol=1e-12)
    assert list(permuted) == list(params)
    assert all(torch.equal(params[name], before[name]) for name in params)
    changed = {name for name in params if not torch.equal(permuted[name], params[name])}
    assert {name.rpartition(".")[0] for name in changed} >= {
        c.removesuffix(".weight") for c in consumers
    }
    for name in (consumers[0], *producers[1:]):  # without any one of them it is another network
        fewer = [c for c in consumers if c != name], [p for p in producers if p != name]
        if any(name in {n, n.rpartition(".")[0]} for n in changed):
            wrong = permute_inputs(params, fewer[0], order, producers=fewer[1])
            assert not torch.allclose(functional_call(model, wrong, (x,)), expected, atol=1e-6)
    back = permute_inputs(permuted, consumers, inverse(order), producers=producers)
    assert all(torch.equal(back[name], params[name]) for name in params)


def test_a_permuted_network_keeps_more_under_its_rule():
    """Defends the way of the data: search, permute, then masks."""
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8))
    params = {**model.state_dict(), "2.weight": random(8, 32)}
    order = search_permutation(params["2.weight"], 2, 4)
    permuted = permute_inputs(params, "2", order, producers=["0"])

    def kept(of: dict[str, Tensor]) -> float:
        return float(
            (of["2.weight"].abs() * compute_masks(of, 0, Rule(pattern=NM(2, 4)))["2.weight"]).sum()
        )

    assert kept(permuted) > 1.02 * kept(params)


def test_names_and_sizes_that_do_not_fit_are_refused():
    """Defends against half a permutation: each error names the tensor and says what to do."""
    params = {"a.weight": random(4, 3), "a.bias": random(4), "b.weight": random(2, 4)}
    order = torch.tensor([1, 0, 3, 2])
    with pytest.raises(SelectionError, match=r"got 'c'|got 'c\.weight'"):
        permute_inputs(params, "c", order, producers=["a"])
    with pytest.raises(SelectionError, match=r"got 'a\.wieght'\. Did you mean 'a\.weight'"):
        permute_inputs(params, "b", order, producers=["a.wieght"])
    with pytest.raises(SelectionError, match=r"once; 'a\.bias' is named twice"):
        permute_inputs(params, "b", order, producers=["a", "a.bias"])
    with pytest.raises(ValueError, match=r"4 channels along dim 0 of 'b\.weight'"):
        permute_inputs(params, "b", order, producers=["a", "b"])
    with pytest.raises(ValueError, match=r"4 channels along dim 1 of 'a\.weight'"):
        permute_inputs(params, ["b", "a"], order, producers=["a"])
    with pytest.raises(ValueError, match=r"4 channels along dim 1 of 'a\.bias'"):
        permute_inputs(params, "a.bias", order, producers=["a"])
    with pytest.raises(TypeError, match=r"Pass \['a'\]"):
        permute_inputs(params, "b", order, producers="a")
