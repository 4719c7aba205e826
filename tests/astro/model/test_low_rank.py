import torch
from torch import nn

from astro.model.low_rank import LowRank, attach, attached


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)).eval()


def factors(rows: int, columns: int, rank: int = 2) -> LowRank:
    generator = torch.Generator().manual_seed(rows)
    return LowRank(torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator))


@torch.no_grad()
def test_an_attached_correction_adds_its_product_to_the_weight() -> None:
    model, correction, x = layers(), factors(5, 6), torch.randn(3, 7, 6)
    with attached(model, {"0": correction}, torch.float32):
        corrected = model(x)
    assert not torch.allclose(corrected, model(x))
    model[0].weight += correction.B @ correction.A
    assert torch.allclose(corrected, model(x), atol=1e-5)


@torch.no_grad()
def test_a_correction_is_gone_behind_the_with_statement_and_behind_its_handle() -> None:
    model, x = layers(), torch.randn(3, 6)
    before = model(x)
    with attached(model, {"1": factors(4, 5)}, torch.float32):
        pass
    for handle in attach(model, {"0": factors(5, 6)}, torch.float32):
        handle.remove()
    assert torch.equal(model(x), before)


def test_a_correction_knows_its_rank_and_size() -> None:
    correction = factors(5, 6, rank=3).to(torch.float16)
    assert (correction.rank, correction.num_weights, correction.A.dtype) == (3, 3 * 11, torch.float16)
