"""Matryoshka heads: prefixes in width and depth that are useful by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.config import from_dict, to_dict
from zoo.errors import ZooError
from zoo.nn.elastic import MatryoshkaConfig, MatryoshkaHead


def head(**changes: object) -> MatryoshkaHead:
    torch.manual_seed(0)
    return MatryoshkaHead(MatryoshkaConfig(**{"widths": (2, 4, 8), "depth": 3, **changes}), 3)  # type: ignore[arg-type]


def test_a_narrow_head_reads_a_prefix_only() -> None:
    made, x = head(), torch.randn(5, 8)
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(made(x, 4), made(changed, 4))
    torch.testing.assert_close(made(x, 4), made(x[:, :4], 4))  # a stored embedding may be cut
    assert not torch.allclose(made(x), made(changed))
    expected = x[:, :2] @ made.linear.weight[:, :2].T + made.linear.bias
    torch.testing.assert_close(made(x, 2), expected)


def test_steps_draw_one_smaller_width_and_one_shallower_state() -> None:
    made = head()
    generator = torch.Generator().manual_seed(3)
    drawn = [made.pairs(5, generator) for _ in range(60)]
    assert all(len(pairs) == 4 and (-1, 8) in pairs for pairs in drawn)
    assert {pair for pairs in drawn for pair in pairs} == {(d, w) for d in (-1, -2, -3) for w in (2, 4, 8)}
    assert len(head(law="all").pairs(3)) == 9
    assert head(depth=1, widths=(8,)).pairs(1) == [(-1, 8)]


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ZooError, match="serves the widths 2, 4, 8, not 3"):
        head()(torch.zeros(1, 8), 3)
    with pytest.raises(ZooError, match="last 3 hidden states, but there are 2"):
        head().pairs(2)
    with pytest.raises(ValueError, match="ascending"):
        MatryoshkaConfig(widths=(4, 2))
    config = MatryoshkaConfig(widths=(2, 8), depth=2, law="all")
    assert from_dict(MatryoshkaConfig, to_dict(config)) == config


def states(blocks: nn.ModuleList, x: Tensor) -> list[Tensor]:
    found = []
    for block in blocks:
        x = x + torch.tanh(block(x))
        found.append(x)
    return found


@pytest.mark.parametrize("law", ["drawn", "all"])
def test_every_prefix_in_width_and_depth_learns_to_classify(law: str) -> None:
    made = head(law=law)
    blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    centres = torch.randn(3, 8)
    labels = torch.arange(3).repeat(40)
    x = centres[labels] + 0.1 * torch.randn(120, 8)
    optimizer = torch.optim.Adam([*made.parameters(), *blocks.parameters()], 0.02)
    for _ in range(200):
        loss = made.loss(states(blocks, x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        hiddens = states(blocks, x)
        for depth in (-1, -2, -3):
            for width in (2, 4, 8):
                right = made(hiddens[depth], width).argmax(-1) == labels
                assert float(right.float().mean()) > 0.95, (depth, width)


def test_shallow_states_are_pulled_towards_the_last_one() -> None:
    labels, hiddens = torch.tensor([0, 1]), [torch.randn(2, 8), torch.randn(2, 8)]
    one = head(depth=2, widths=(8,))
    plain = head(depth=2, widths=(8,), align=0.0)
    plain.load_state_dict(one.state_dict())
    gap = (one.loss(hiddens, labels) - plain.loss(hiddens, labels)).item()
    teacher, pupil = (one(h).log_softmax(-1) for h in (hiddens[1], hiddens[0]))
    assert gap == pytest.approx((teacher.exp() * (teacher - pupil)).sum(-1).mean().item(), rel=1e-4)
    same = [hiddens[1], hiddens[1]]
    assert one.loss(same, labels).item() == pytest.approx(plain.loss(same, labels).item(), abs=1e-6)
