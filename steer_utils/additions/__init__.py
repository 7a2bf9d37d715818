"""Activation additions and x-vectors (Turner et al. 2023, arXiv:2308.10248). Start at `addition`."""
