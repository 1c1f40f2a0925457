"""Callbacks that observe the way of a batch; none of them changes training."""
