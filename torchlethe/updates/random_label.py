"""Random labels: the forget set is trained on wrong labels, the remaining data on its own.

Sources: Golatkar et al., CVPR 2020, https://arxiv.org/abs/1911.04933; as coded in
https://github.com/OPTML-Group/Unlearn-Saliency (the defaults), https://github.com/K1nght/Unified-Unlearning-w-Remain-Geometry
(``order="joined", labels="other", redraw="once"``) and, as "amnesiac", in
https://github.com/vikram2000b/bad-teaching-unlearning (the same with Adam).
"""

from __future__ import annotations

from torchlethe.updates.relabelled import RelabelledUpdate


class RandomLabelUpdate(RelabelledUpdate):
    """Train on random labels; the arguments are those of :class:`~torchlethe.updates.relabelled.RelabelledUpdate`."""
