import torch

from jest_core.selection import Embeddings
from tests.core.selection.draws import model


def test_matched_logits_are_the_diagonal_of_all_logits():
    m = model(1500, 8, 0)  # more than a tile
    every = m.logit_scale * m.image @ m.text.T + m.logit_bias
    torch.testing.assert_close(m.matched_logits(), every.diagonal())


def test_rows_keep_scale_and_bias():
    m = model(10, 4, 0, scale=3.0, bias=-2.0)
    part = m[torch.tensor([7, 2])]
    assert (len(part), part.logit_scale, part.logit_bias) == (2, 3.0, -2.0)
    assert torch.equal(part.text, m.text[[7, 2]])


def test_numbers_are_those_of_the_tensors():
    m = Embeddings(torch.ones(2, 2), torch.ones(2, 2), torch.tensor(10.5), torch.tensor(-8.0))
    assert (m.with_numbers().logit_scale, m.with_numbers().logit_bias) == (10.5, -8.0)
