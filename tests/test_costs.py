"""Work of the operators of the families, by hand."""

import capszoo


def macs(name, **kwargs):
    return capszoo.model_info(name, **kwargs).macs


def test_a_pass_of_inverted_attention():
    """800 children and 10 classes of 4x4 poses: a vote is 64, an agreement 16, a weighted sum 16."""
    name = "capsnet_resnet_ia"
    assert macs(name, num_passes=2) - macs(name, num_passes=1) == 800 * 10 * (64 + 16 + 16)
    hidden = (49 + 25) * 9 * 32 * 32 * (64 + 16 + 16)  # 7x7 and 5x5 places, patches of 3x3
    assert macs(name, concurrent=False) - macs(name, num_passes=1) == hidden + 800 * 10 * 96


def test_an_iteration_of_matrix_capsules():
    """Votes, their distance from the average of the iteration before, a new average, a scatter."""
    more = macs("capsnet_em", num_routing=3) - macs("capsnet_em", num_routing=2)
    assert more == (25 * 9 * 32 * 32 + 9 * 9 * 32 * 32 + 9 * 32 * 10) * (64 + 16 + 16 + 16)
