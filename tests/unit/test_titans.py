"""Neural memory against a loop that asks autograd for the surprises; Titans' variants against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from zoo.convert.titans import config_from_official, to_official, to_zoo
from zoo.errors import ConfigError, ZooError
from zoo.nn.layout import CAUSAL
from zoo.nn.memory import NeuralMemory, NeuralMemoryConfig, memory_network
from zoo.nn.recall import answers, apart, surprises
from zoo.nn.titans import Titans, TitansConfig, WindowAttention


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_surprises_and_answers_are_those_of_the_network(depth: int) -> None:
    sizes = tuple(itertools.pairwise([4, *[6] * (depth - 1), 4]))
    networks, chunks = 2, 3
    k, v = (torch.randn(networks, chunks, 5, 4, dtype=torch.float64) for _ in range(2))
    rate = torch.rand(networks, chunks, 5, dtype=torch.float64)
    flat = torch.randn(networks, 4 + sum(a * b for a, b in sizes), dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (k, v, rate, flat)]

    def recall_loss(row: Tensor, n: int, m: int) -> Tensor:
        gain, *matrices = apart(row[None], sizes)
        error = memory_network(k[n, m], [gain[0, 0], *(w[0] for w in matrices)]) - v[n, m]
        return (rate[n, m] * error.square().mean(-1)).sum()

    rows = [[flat[n] * 1 for _ in range(chunks)] for n in range(networks)]
    wanted = torch.stack(
        [
            torch.stack(
                [torch.autograd.grad(recall_loss(row, n, m), row, create_graph=True)[0] for m, row in enumerate(part)]
            )
            for n, part in enumerate(rows)
        ]
    )
    given = surprises(*inputs, sizes)
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-11)
    weight = torch.randn_like(given)
    theirs = torch.autograd.grad((wanted * weight).sum(), inputs)
    for a, b in zip(torch.autograd.grad((given * weight).sum(), inputs), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    q = k[:, 0].detach().requires_grad_()
    gain, *matrices = apart(flat.detach(), sizes)
    torch.testing.assert_close(answers(q, flat, sizes), memory_network(q, [gain[:, 0], *matrices]))
    assert torch.autograd.gradcheck(lambda *t: answers(*t, sizes), (q, flat.detach().requires_grad_()))


def definition(layer: NeuralMemory, x: Tensor) -> Tensor:
    """One head, one sequence x [L, D], a token at a time."""
    cfg = layer.config
    weights = [w[0].detach() for w in layer.memory]
    base = list(weights)
    momentum = [[torch.zeros_like(w) for w in weights] for _ in range(cfg.momentum_order)]
    out = []
    for t in range(len(x)):
        if (t + 1) % cfg.chunk == 0:
            s = layer.store_norm(x[t + 1 - cfg.chunk : t + 1])
            leaves = [w.clone().requires_grad_() for w in base]
            error = (memory_network(layer.k_proj(s), leaves) - layer.v_proj(s)).square().mean(-1)
            rate = layer.step_size(s).sigmoid()[:, 0] * cfg.max_lr
            step = [-g for g in torch.autograd.grad((rate * error).sum(), leaves)]
            mean = s.mean(0)
            eta, alpha = layer.momentum(mean).sigmoid(), layer.decay(mean).sigmoid()
            for order in range(cfg.momentum_order):
                step = [eta[order] * m + u for m, u in zip(momentum[order], step, strict=True)]
                momentum[order] = step
            weights = [(1 - alpha) * w + u for w, u in zip(weights, step, strict=True)]
            if cfg.refresh and (t + 1) // cfg.chunk % cfg.refresh == 0:
                base = list(weights)
        q = layer.q_proj(layer.retrieve_norm(x[t]))
        out.append(memory_network(q[None], weights)[0])
    return torch.stack(out)


@pytest.mark.parametrize("options", [{}, {"momentum_order": 2}, {"refresh": 1}, {"refresh": 2, "chunk": 2}])
@pytest.mark.parametrize("length", [1, 3, 14])
def test_memory_is_its_recurrence(options: dict, length: int) -> None:
    layer = NeuralMemory(4, NeuralMemoryConfig(**{"chunk": 3, "expansion": 2.0, "max_lr": 0.3, **options})).double()
    x = torch.randn(2, length, 4, dtype=torch.float64)
    y, _ = layer(x, CAUSAL)
    for row in range(2):
        torch.testing.assert_close(y[row], definition(layer, x[row]), rtol=1e-8, atol=1e-10)


def test_training_by_spans_gives_the_same_gradients() -> None:
    layer = NeuralMemory(4, NeuralMemoryConfig(chunk=1, expansion=1.0, max_lr=0.1)).double()
    x = torch.randn(1, 21, 4, dtype=torch.float64, requires_grad=True)  # several spans, recomputed
    (grad,) = torch.autograd.grad(layer(x, CAUSAL)[0].square().sum(), x)
    eps = torch.zeros_like(x)
    eps[0, 5, 2] = 1e-6
    with torch.no_grad():
        ahead, behind = (layer(x + s * eps, CAUSAL)[0].square().sum() for s in (1, -1))
    torch.testing.assert_close(grad[0, 5, 2], (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)


def test_window_attention_sees_its_window_and_what_persists() -> None:
    layer = WindowAttention(4, 2, 3, 2).double()
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    y, _ = layer.mix(x, None, None)
    index = torch.arange(11)
    near = (index[:, None] >= index) & (index[:, None] - index < 3)
    k, v = layer.kv_proj(x).chunk(2, -1)
    torch.testing.assert_close(y, layer.attend(layer.q_proj(x), k, v, near[None]), rtol=1e-9, atol=1e-11)


def test_variants_combine_attention_and_memory() -> None:
    memory = NeuralMemoryConfig(chunk=4, expansion=1.0)
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    for variant in ("mag", "mal"):
        layer = Titans(8, TitansConfig(variant=variant, heads=2, window=4, memory=memory)).double()
        m, _ = layer.memory(x, CAUSAL)
        y, _ = layer.attention.mix(m if variant == "mal" else x, None, None)
        y = y * m.sigmoid() if variant == "mag" else y
        torch.testing.assert_close(layer(x, CAUSAL)[0], layer.out_proj(y), rtol=1e-9, atol=1e-11)
    layer = Titans(8, TitansConfig(heads=2, window=4, memory=memory)).double()
    state, expected = layer.memory.init_state(2, 10, dtype=torch.float64), []
    for part in x.split(4, 1):  # answers come from the memory of the segments before
        still = [torch.stack([w, w], 2) for w in state.weights]
        answers = layer.memory.read(torch.nn.functional.pad(part, (0, 0, 0, 4 - part.shape[1])), still)
        k, v = layer.attention.kv_proj(torch.cat([answers[:, : part.shape[1]], part], 1)).chunk(2, -1)
        see = torch.ones(part.shape[1], part.shape[1], dtype=torch.bool).tril().repeat(1, 2)
        y = layer.out_proj(layer.attention.attend(layer.attention.q_proj(part), k, v, see[None]))
        m, state = layer.memory(y, CAUSAL, state)
        expected.append(y * m.sigmoid())
    torch.testing.assert_close(layer(x, CAUSAL)[0], torch.cat(expected, 1), rtol=1e-9, atol=1e-11)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="window 64"):
        Titans(8, TitansConfig(memory=NeuralMemoryConfig(chunk=32)))
    with pytest.raises(ConfigError, match="one head"):
        NeuralMemory(8, NeuralMemoryConfig(head_dim=4))
    with pytest.raises(ConfigError, match="divide"):
        NeuralMemory(8, NeuralMemoryConfig(heads=3))


def test_conversion_is_a_bijection() -> None:
    config = config_from_official(
        {"dim": 8, "chunk_size": 4, "heads": 2, "dim_head": 4, "momentum_order": 2, "qk_rmsnorm": True, "batch_size": 8}
    )
    assert config.refresh == 2
    state = NeuralMemory(8, config).state_dict()
    official = to_official(state, config)
    assert official["memory_model.norm.gamma"].shape == (4,)
    back = to_zoo(official, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(ZooError, match="unknown"):
        to_zoo({**official, "transition_gate": torch.zeros(1)}, config)
    with pytest.raises(ConfigError, match="post_rmsnorm"):
        config_from_official({"dim": 8, "post_rmsnorm": True})
