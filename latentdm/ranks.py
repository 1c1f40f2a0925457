"""Which of several processes this is, where no Trainer says so."""

from torch import distributed


def process_ranks() -> dict[str, int]:
    """How many ranks torch's process group has, and which of them this is; alone without one.

    Returns:
        ``num_replicas`` and ``rank``, as samplers call them.
    """
    if distributed.is_available() and distributed.is_initialized():
        return {"num_replicas": distributed.get_world_size(), "rank": distributed.get_rank()}
    return {"num_replicas": 1, "rank": 0}
