"""The small real world everything is measured in: emoji art, scenes, looks, motions and their captions.

The art is known exactly, so boxes, masks and the true picture of every subject in every look are known too.
Everything here is deterministic given a :class:`numpy.random.Generator` and needs no network and no torch.
"""
