import torch

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
