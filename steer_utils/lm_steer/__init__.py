"""LM-Steer (Han et al., ACL 2024). Start at `steer`."""

from . import evidence, steer, training, transfer, words  # noqa: F401, so that `su.lm_steer.words` is there
